"""Is a Challenger's completion a task? The paper's whole rule is "formatted correctly and parsable" [section 2.2].

The checks go from the completion's form to the task's own rules, and the first that fails names the reason: whether
it was cut, whether it parses (the prompt style's part), what its answer type demands, and last the switches that the
paper does not have. Deterministic and in-process, but for one thing: whether an expression can be read is asked of
the verifier's worker by `play.py`, since reading one can hang.
"""

from __future__ import annotations

import re

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.audit.flags import flags_of
from megatron_spice.game.expression import looks_mathematical
from megatron_spice.game.grounding import refers_to_passage
from megatron_spice.game.numerals import is_integer
from megatron_spice.game.options import LETTERS, split_options
from megatron_spice.game.prompts import PromptStyle
from megatron_spice.game.records import AnswerType, Completion, InvalidReason, Task

MAX_STRING_WORDS = 3
MAX_GOLD_LENGTH = 200


def check_task(task: Task) -> InvalidReason | None:
    """Why a parsed task breaks the rules of its answer type, None when it does not."""
    if not task.question.strip():
        return InvalidReason.EMPTY_QUESTION
    answer = task.gold_answer.strip()
    if not answer:
        return InvalidReason.EMPTY_ANSWER
    if task.answer_type == "MCQ":
        if split_options(task.question) is None:
            return InvalidReason.BAD_OPTIONS
        return None if answer in LETTERS else InvalidReason.BAD_LETTER
    if task.answer_type == "Integer":
        return None if is_integer(answer) and len(answer) <= MAX_GOLD_LENGTH else InvalidReason.BAD_INTEGER
    if task.answer_type == "Expression":
        return None if looks_mathematical(answer) else InvalidReason.BAD_EXPRESSION
    if not re.search(r"\w", answer):
        return InvalidReason.EMPTY_ANSWER
    too_long = len(answer.split()) > MAX_STRING_WORDS or len(answer) > MAX_GOLD_LENGTH
    return InvalidReason.LONG_STRING if too_long else None


def read_attempt(completion: Completion, answer_type: AnswerType, style: PromptStyle) -> Task | InvalidReason:
    """The task in a completion, or why there is none. An answer cut by the length limit is never a task."""
    if completion.finish != "stop":
        return InvalidReason.TRUNCATED
    parsed = style.parse_task(completion.text, answer_type)
    if isinstance(parsed, InvalidReason):
        return parsed
    return check_task(parsed) or parsed


def check_switches(task: Task, grounded: bool | None, config: GameConfig, passage: str | None = None) -> InvalidReason | None:
    """The rules beyond the paper's: `game.grounding` and `game.reject_...`. `grounded` and `passage` are None without one."""
    if config.grounding == "span" and grounded is False:
        return InvalidReason.UNGROUNDED
    if config.reject_references and refers_to_passage(task.question):
        return InvalidReason.REFERS_TO_PASSAGE
    if config.reject_copies is None and not config.reject_giveaways:
        return None
    flags = flags_of(task, passage)
    if config.reject_copies is not None and (flags.copied_words or 0) >= config.reject_copies:
        return InvalidReason.COPIED
    return InvalidReason.GIVES_AWAY if config.reject_giveaways and flags.gives_away else None

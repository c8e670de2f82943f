"""Is a task's answer in the passage, and not given away by its question?

The paper checks neither: whatever the Challenger writes as the answer is gold. Measured on a small model that let
nine tasks in ten drift away from the passage, so the share of grounded tasks is always counted, and `game.grounding:
span` makes it a rule. It is a test of occurrence, not of truth: a passage's most frequent name is grounded in every
question.
"""

from __future__ import annotations

import re

from megatron_spice.game.numerals import numbers_in, read_quantity
from megatron_spice.game.options import split_options
from megatron_spice.game.records import Task
from megatron_spice.game.text import fold, normalise

_TEXT = r"(?:passage|text|document|article|excerpt|paragraph|extract|author)"
_VERB = r"(?:say|state|mention|describe|list|give|report|note|suggest|claim)s?"
_SAID = r"(?:mentioned|stated|described|given|listed|noted|provided)"
_REFERENCE = re.compile(
    rf"\b(?:according to|based on|in|from|of)\s+(?:the|this|that)\s+(?:(?:above|given|provided|following)\s+)?{_TEXT}\b"
    rf"|\b(?:the|this)\s+{_TEXT}\s+{_VERB}\b"
    rf"|\b{_SAID}\s+(?:above|earlier|before)\b",
    re.IGNORECASE,
)


def occurs(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text`: a number as a whole number, anything else between word boundaries."""
    number = read_quantity(answer)
    if number is not None and re.fullmatch(r"[^A-Za-z]*", answer):
        return number in numbers_in(text)
    wanted = normalise(answer)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", fold(text)) is not None


def is_grounded(task: Task, passage: str) -> bool:
    """Whether the gold answer (for MCQ the chosen option's text) occurs in the passage and not in the question's
    stem."""
    answer, question = task.gold_answer, task.question
    if task.answer_type == "MCQ":
        split = split_options(task.question)
        if split is None:
            return False
        question, answer = split[0], split[1][task.gold_answer]
    return occurs(answer, passage) and not occurs(answer, question)


def refers_to_passage(question: str) -> bool:
    """Whether a question points at a text that the Reasoner will not see (`according to the passage`, ...)."""
    return _REFERENCE.search(question) is not None

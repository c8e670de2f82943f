"""One passage, played: Algorithm 1, lines 4 to 19, for one document [paper section 2].

Each passage is a coroutine of its own, and nothing in it waits for another passage: the Reasoner answers one
passage's tasks while the Challenger still writes another's, which keeps an engine's batch full without a barrier
between the roles. Within a passage all tasks are answered at once. All choices derive from (seed, iteration, slot),
so a passage that is played again makes the same choices; what the model then writes is the engine's own chance. No two
requests of a game have the same purpose, hence seed: by it `journal.py` knows what the engine has said to which.

Attempts are sampled in chunks until one is valid and there are at least G, at most N: the paper's "up to 1024
attempts aiming for one valid" without always paying for 1024.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.audit.words import words
from megatron_spice.game.grounding import is_grounded
from megatron_spice.game.groups import advantages, subsample
from megatron_spice.game.prompts import PromptStyle
from megatron_spice.game.records import (
    Answer, AnswerType, Attempt, Completion, Episode, Generator, InvalidReason, Passage, Prompt, Role, Sampling, Task,
    Tokenizer,
)  # fmt: skip
from megatron_spice.game.rewards import challenger_reward, majority_share, reasoner_reward
from megatron_spice.game.styles import style_for
from megatron_spice.game.together import together
from megatron_spice.game.validate import check_switches, read_attempt
from megatron_spice.game.verify import Verifier


async def play_passage(
    passage: Passage,
    *,
    iteration: int,
    slot: int,
    engine: Generator,
    tokenizer: Tokenizer,
    verifier: Verifier,
    config: GameConfig,
    temperature: float,
    top_p: float,
    seed: int,
    challenger: Wording | None = None,
    context: int | None = None,
) -> Episode:
    """Plays one passage to the end.

    Args:
        iteration: the one in which the game was begun, now or earlier.
        slot: the passage's place in that iteration's batch.
        engine: samples completions; whatever it raises (EngineError, GamePutOff) ends the game of this passage unscored.
        tokenizer: the policy's; its chat format is the Reasoner's, and the Challenger's unless `challenger` says otherwise.
        verifier: a started `Verifier`.
        config: the game's rules.
        temperature, top_p: of both roles.
        seed: the run's (`train.seed`).
        challenger: how the Challenger is spoken to where another model than the policy writes the tasks; None: like the Reasoner.
        context: tokens that prompt and completion may have together. A question that leaves the Reasoner no room is no task. None:
            the engine decides.

    Returns: The episode, rewards and advantages set on the Challenger's group and on the Reasoner's answers. Without
        any valid attempt it has no answers, and the group's equal rewards give advantages of zero.
    """
    started = time.monotonic()
    reasoner = Wording.of(config.prompt_style, tokenizer)
    seeds = (seed, iteration, slot)
    table = Table(engine, verifier, config, challenger or reasoner, reasoner, temperature, top_p, seeds, context)
    answer_type, attempts, timeouts = await write_tasks(table, passage)

    group = subsample([attempt.task is not None for attempt in attempts], config.group_size, table.random("group"))
    valid = [index for index in group if attempts[index].task is not None]
    answers = dict(zip(valid, await together([answer_task(table, attempts[index].task, index) for index in valid])))
    attempts = _score(attempts, group, answers, config)
    if valid:
        chosen = table.random("task").choice(valid)
        attempts[chosen] = _as_reasoner_task(attempts[chosen])

    timeouts += sum(
        answer.verdict.reason == "timeout" for group_answers in answers.values() for answer in group_answers
    )
    return Episode(
        iteration,
        slot,
        passage,
        table.challenger.style.name,
        answer_type,
        tuple(attempts),
        timeouts,
        time.monotonic() - started,
        reasoner_prompt_style=reasoner.style.name,
    )


@dataclass(frozen=True)
class Wording:
    """How a model is spoken to."""

    tokenizer: Tokenizer
    style: PromptStyle

    @classmethod
    def of(cls, style: str, tokenizer: Tokenizer) -> Wording:
        """The style that `game.prompt_style` names, in this tokenizer's chat format."""
        return cls(tokenizer, style_for(style, tokenizer))


@dataclass(frozen=True)
class Table:
    """What a game is played with. `seeds`: the run's, the iteration and the slot, from which all choices derive."""

    engine: Generator
    verifier: Verifier
    config: GameConfig
    challenger: Wording
    reasoner: Wording
    temperature: float
    top_p: float
    seeds: tuple[int, int, int]
    context: int | None = None

    def has_room(self, task: Task) -> bool:
        """Whether the Reasoner's prompt and as long an answer as it may give fit the context."""
        if self.context is None:
            return True
        prompt_ids = self.reasoner.tokenizer.encode_prompt(self.reasoner.style.reasoner_prompt(task))
        return len(prompt_ids) + self.config.reasoner_max_tokens <= self.context

    def random(self, purpose: str) -> random.Random:
        """A stream of its own for every choice: one more draw here moves none there."""
        return random.Random(f"{self.seeds} {purpose}")

    async def sample(
        self, role: Role, prompt: Prompt, count: int, limit: int, stop: tuple[str, ...], purpose: str
    ) -> list[Completion]:
        """`count` completions of a role's prompt, `limit` tokens each at most."""
        wording = self.challenger if role == "challenger" else self.reasoner
        sampling = Sampling(self.temperature, limit, self.top_p, stop, self.random(purpose).getrandbits(31), role)
        completions = await self.engine.generate(wording.tokenizer.encode_prompt(prompt), count, sampling)
        if any(completion.finish == "abort" for completion in completions):
            raise RuntimeError(f"the engine aborted a request of the {purpose}; what it had written must not be scored")
        return completions


async def write_tasks(table: Table, passage: Passage) -> tuple[AnswerType, list[Attempt], int]:
    """The Challenger's part: the kind of task, its attempts, and how many readings of expressions timed out."""
    answer_type = await _choose_type(table, passage)
    return answer_type, *await _sample_attempts(table, passage, answer_type)


async def _choose_type(table: Table, passage: Passage) -> AnswerType:
    """The kind of task: the model's choice if it is asked, can be read and is among those wanted, else drawn
    uniformly."""
    config, kinds = table.config, table.config.answer_types
    if config.format_selection == "model" and len(kinds) > 1 and not config.no_corpus:
        style = table.challenger.style
        prompt = style.selection_prompt(passage)
        if prompt is not None:
            [choice] = await table.sample("challenger", prompt, 1, config.selection_max_tokens, (), "selection")
            kind = style.parse_selection(choice.text)
            if kind in kinds:
                return kind
    return table.random("format").choice(kinds)


async def _sample_attempts(table: Table, passage: Passage, answer_type: AnswerType) -> tuple[list[Attempt], int]:
    """Challenger attempts, until one is valid and there are G, N at most; and the readings that timed out."""
    config, style = table.config, table.challenger.style
    prompt = style.challenger_prompt(None if config.no_corpus else passage, answer_type)
    attempts: list[Attempt] = []
    timeouts = 0
    while len(attempts) < config.attempts:
        if len(attempts) >= config.group_size and any(attempt.task is not None for attempt in attempts):
            break
        count = min(config.attempt_chunk, config.attempts - len(attempts))
        purpose = f"challenger {len(attempts)}"
        limit, stop = config.challenger_max_tokens, style.challenger_stop
        completions = await table.sample("challenger", prompt, count, limit, stop, purpose)
        judged = await together([_judge(table, completion, passage, answer_type) for completion in completions])
        attempts += [attempt for attempt, _ in judged]
        if config.reject_duplicates:
            attempts = _without_repeats(attempts)
        timeouts += sum(timed_out for _, timed_out in judged)
    return attempts, timeouts


def _without_repeats(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts; a valid one whose question an earlier valid one asked is invalid."""
    asked: set[tuple[str, ...]] = set()
    kept = []
    for attempt in attempts:
        question = tuple(words(attempt.task.question)) if attempt.task is not None else None
        if question in asked:
            attempt = Attempt(attempt.completion, None, InvalidReason.DUPLICATE)
        elif question is not None:
            asked.add(question)
        kept.append(attempt)
    return kept


async def _judge(
    table: Table, completion: Completion, passage: Passage, answer_type: AnswerType
) -> tuple[Attempt, bool]:
    """The attempt that a completion is, and whether reading its expression timed out."""
    task = read_attempt(completion, answer_type, table.challenger.style)
    if isinstance(task, InvalidReason):
        return Attempt(completion, None, task), False
    if task.answer_type == "Expression":
        outcome = await table.verifier.read_expression(task.gold_answer)
        if outcome != "ok":
            return Attempt(completion, None, InvalidReason.BAD_EXPRESSION), outcome == "timeout"
    grounded = None if table.config.no_corpus else is_grounded(task, passage.text)
    invalid = check_switches(task, grounded, table.config, None if table.config.no_corpus else passage.text)
    if invalid is not None:
        return Attempt(completion, None, invalid), False
    if not table.has_room(task):
        return Attempt(completion, None, InvalidReason.LONG_QUESTION), False
    return Attempt(completion, task, None, grounded), False


async def answer_task(table: Table, task: Task, index: int) -> tuple[Answer, ...]:
    """K = G answers of the Reasoner to one task, verified; `index` tells the passage's tasks apart."""
    config, style = table.config, table.reasoner.style
    completions = await table.sample(
        "reasoner",
        style.reasoner_prompt(task),
        config.group_size,
        config.reasoner_max_tokens,
        style.reasoner_stop,
        f"reasoner {index}",
    )
    verdicts = await together(
        [table.verifier.verify(task, style.extract_answer(completion.text)) for completion in completions]
    )
    return tuple(
        Answer(completion, verdict, reasoner_reward(verdict.correct))
        for completion, verdict in zip(completions, verdicts)
    )


def _score(
    attempts: Sequence[Attempt], group: list[int], answers: dict[int, tuple[Answer, ...]], config: GameConfig
) -> list[Attempt]:
    """The attempts, those of the group with answers, reward and advantage within the group."""
    scored = list(attempts)
    for index in group:
        attempt = replace(scored[index], in_group=True, answers=answers.get(index, ()))
        scored[index] = replace(attempt, reward=_paid(attempt, config))
    for index, advantage in zip(group, advantages([scored[index].reward for index in group])):
        scored[index] = replace(scored[index], advantage=advantage)
    return scored


def _paid(attempt: Attempt, config: GameConfig) -> float:
    """What the Challenger gets for an attempt that has been answered, or is no task."""
    if attempt.task is None:
        return config.invalid_reward
    if config.challenger_reward == "r_zero_majority":
        return challenger_reward("r_zero", majority_share([answer.verdict.extracted for answer in attempt.answers]))
    return challenger_reward(config.challenger_reward, attempt.pass_rate)


def _as_reasoner_task(attempt: Attempt) -> Attempt:
    """The attempt whose answers are the Reasoner's training group: the same answers that paid the Challenger."""
    relative = advantages([answer.reward for answer in attempt.answers])
    answers = tuple(replace(answer, advantage=advantage) for answer, advantage in zip(attempt.answers, relative))
    return replace(attempt, answers=answers, is_reasoner_task=True)

"""Asking again, to audit a gold answer: with the passage in view, and for multiple choice with the options alone.

Agreement with the passage in view is the nearest that self-play has to a test of truth: whoever reads the passage should give
the gold answer. It is a lower bound where the reader is weak, and an upper one where reader and writer share a mistake, so a
stronger reader says more. Success with the options alone is the guess-rate: what a question's options give away without it.

A passage and a question together may be longer than anything the game itself asks. What leaves no room for an answer is not
asked: an audit must not end a run.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_spice.game.options import split_options
from megatron_spice.game.play import Table
from megatron_spice.game.records import Answer, Attempt, Episode, Passage, Prompt, Task
from megatron_spice.game.rewards import reasoner_reward
from megatron_spice.game.together import together

STEM = "Which of these is right?"
"""What stands in place of the question where only its options are shown."""


async def reanswered(table: Table, episode: Episode, grounded: int, options_only: int, context: int | None = None) -> Episode:
    """The episode, its Reasoner's task answered again.

    Args:
        grounded: how often with the passage in view.
        options_only: how often with nothing but the options, if it is multiple choice.
        context: tokens that prompt and answer may have together; what may need more is not asked. None: the engine decides.
    """

    async def again(index: int, attempt: Attempt) -> Attempt:
        if not attempt.is_reasoner_task or attempt.task is None:
            return attempt
        with_passage: tuple[Answer, ...] = ()
        alone: tuple[Answer, ...] = ()
        if grounded and not table.config.no_corpus:
            with_passage = await grounded_answers(table, attempt.task, episode.passage, grounded, f"audit {index}", context)
        if options_only and (bare := options_alone(attempt.task)) is not None:
            prompt = table.reasoner.style.reasoner_prompt(bare)
            alone = await _answers(table, prompt, attempt.task, options_only, f"audit options {index}", context)
        return replace(attempt, grounded_answers=with_passage, options_only_answers=alone)

    attempts = await together([again(index, attempt) for index, attempt in enumerate(episode.attempts)])
    return replace(episode, attempts=tuple(attempts))


async def grounded_answers(
    table: Table, task: Task, passage: Passage, count: int, purpose: str, context: int | None = None
) -> tuple[Answer, ...]:
    """`count` answers to a task with its passage in view, verified; none where prompt and answer may need more than `context`
    tokens.

    Raises:
        EngineRefused: the engine's own context is shorter.
    """
    return await _answers(table, table.reasoner.style.grounded_prompt(task, passage), task, count, purpose, context)


def options_alone(task: Task) -> Task | None:
    """The task without its question, None if it is not multiple choice."""
    split = split_options(task.question) if task.answer_type == "MCQ" else None
    if split is None:
        return None
    lines = [f"{letter}) {text}" for letter, text in split[1].items()]
    return replace(task, question="\n".join([STEM, *lines]))


async def _answers(
    table: Table, prompt: Prompt, task: Task, count: int, purpose: str, context: int | None
) -> tuple[Answer, ...]:
    style, limit = table.reasoner.style, table.config.reasoner_max_tokens
    if context is not None and len(table.reasoner.tokenizer.encode_prompt(prompt)) + limit > context:
        return ()
    completions = await table.sample("reasoner", prompt, count, limit, style.reasoner_stop, purpose)
    verdicts = await together([table.verifier.verify(task, style.extract_answer(each.text)) for each in completions])
    return tuple(Answer(each, verdict, reasoner_reward(verdict.correct)) for each, verdict in zip(completions, verdicts))

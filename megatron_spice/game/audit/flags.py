"""What can be said against one task by looking at it and its passage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spice.game.audit.spans import COPIED_WORDS, copied_words
from megatron_spice.game.grounding import occurs, refers_to_passage
from megatron_spice.game.options import split_options
from megatron_spice.game.records import Task


@dataclass(frozen=True, slots=True)
class Flags:
    """`copied_words`: the longest run of words that the question (MCQ: its stem) shares with the passage, None without one.
    `refers`: it points at a text that the Reasoner does not see. `gives_away`: the gold answer stands in the question's stem."""

    copied_words: int | None
    refers: bool
    gives_away: bool

    @property
    def copied(self) -> bool:
        """The question is a copy (`COPIED_WORDS`)."""
        return self.copied_words is not None and self.copied_words >= COPIED_WORDS

    def names(self) -> list[str]:
        """Those that are raised."""
        return [name for name in ("copied", "refers", "gives_away") if getattr(self, name)]


def flags_of(task: Task, passage: str | None) -> Flags:
    """Looks at a task; `passage` is None where it was written from nothing."""
    stem, answer = task.question, task.gold_answer
    if task.answer_type == "MCQ" and (split := split_options(task.question)) is not None:
        stem, answer = split[0], split[1].get(task.gold_answer, task.gold_answer)
    copied = None if passage is None else copied_words(stem, passage)
    return Flags(copied, refers_to_passage(stem), occurs(answer, stem))

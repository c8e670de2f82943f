"""The episode log, read once from front to back, however long it is: where each episode stands, and what was asked.

A cluster's log has gigabytes. Of most lines only the beginning is looked at, where the iteration stands, and only their place
in the file is kept; those of the first and the last iterations are read whole. Texts are kept of a few, drawn by chance with a
fixed seed so that the same log gives the same report.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHOWN_TASKS = 4  # examples of a window
_BEGINNING = re.compile(rb'\{"iteration": (\d+), ')


@dataclass
class Window:
    """What was asked in some iterations, over all valid attempts.

    Attributes:
        numbers: the iterations; `seen`, those that have episodes.
        attempts, tasks: attempts, and how many were valid.
        grounded: answers that occur in the passage, of `grounding_known`.
        words: of all questions together.
        reads: questions that were asked word for word before in the window are in `tasks` but not in `distinct`.
        examples: tasks as they stand in the log, each with its iteration and pass rate's parts, drawn by chance.
    """

    numbers: Sequence[int]
    attempts: int = 0
    tasks: int = 0
    grounded: int = 0
    grounding_known: int = 0
    words: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    golds: Counter[str] = field(default_factory=Counter)
    distinct: set[str] = field(default_factory=set)
    examples: list[dict] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    @property
    def span(self) -> str:
        """In words which iterations there are episodes of."""
        first, last = min(self.seen, default=0), max(self.seen, default=0)
        return f"iterations {first} to {last}" if first < last else f"iteration {first}"

    def add(self, iteration: int, attempt: dict, chance: random.Random) -> None:
        """Count an attempt."""
        self.attempts += 1
        self.seen.add(iteration)
        task = attempt.get("task")
        if not isinstance(task, dict):
            return
        self.tasks += 1
        question, gold = str(task.get("question", "")), str(task.get("gold_answer", ""))
        words = question.split()
        self.words += len(words)
        self.kinds[str(task.get("answer_type", "?"))] += 1
        self.openings[" ".join(words[:2]).lower()] += 1
        self.golds[gold.strip().lower()] += 1
        self.distinct.add(" ".join(words).lower())
        if attempt.get("grounded") is not None:
            self.grounding_known += 1
            self.grounded += bool(attempt["grounded"])
        # Reservoir sampling: every task is as likely as any other to be among the examples.
        place = len(self.examples) if self.tasks <= SHOWN_TASKS else chance.randrange(self.tasks)
        if place < SHOWN_TASKS:
            answers = dicts(attempt.get("answers"))
            example = {
                "iteration": iteration, "question": question, "gold": gold, "kind": str(task.get("answer_type", "?")),
                "passed": sum(bool(answer.get("correct")) for answer in answers), "answers": len(answers),
            }  # fmt: skip
            self.examples[place : place + 1] = [example]


@dataclass(frozen=True)
class EpisodeFile:
    """A run's episodes: `places` are (iteration, offset in bytes, length in bytes) in the order of the file."""

    path: Path
    places: Sequence[tuple[int, int, int]]
    early: Window
    late: Window
    broken: int

    def read(self, places: Sequence[tuple[int, int, int]]) -> Iterator[dict]:
        """The episodes at these places, without those that cannot be read."""
        with open(self.path, "rb") as file:
            for _, offset, length in places:
                file.seek(offset)
                if (episode := _episode(file.read(length))) is not None:
                    yield episode


def scan(path: Path, early: Sequence[int], late: Sequence[int]) -> EpisodeFile | None:
    """The file, or None if there is none or nothing in it; `early` and `late` are the iterations that are looked at closer."""
    if not path.is_file():
        return None
    windows, chance = (Window(early), Window(late)), random.Random(0)
    places: list[tuple[int, int, int]] = []
    offset = broken = 0
    with open(path, "rb") as file:
        for line in file:
            start, offset = offset, offset + len(line)
            begins = _BEGINNING.match(line) if line.endswith(b"}\n") else None
            number = int(begins[1]) if begins else None
            wanted = [window for window in windows if number is None or number in window.numbers]
            if wanted:
                episode = _episode(line)
                if episode is None:
                    broken += 1
                    continue
                number = episode["iteration"]
            places.append((number, start, len(line)))
            for window in wanted:
                for attempt in episode["attempts"] if number in window.numbers else ():
                    window.add(number, attempt, chance)
    return EpisodeFile(path, places, *windows, broken) if places or broken else None


def dicts(value: object) -> list[dict]:
    """The objects of a list, [] of anything else: a log may be of another version, or damaged."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _episode(line: bytes) -> dict | None:
    """The episode of a line, None for one that is half written or is no episode."""
    try:
        episode = json.loads(line)
    except ValueError:
        return None
    usable = isinstance(episode, dict) and type(episode.get("iteration")) is int
    attempts = episode.get("attempts") if usable else None
    return episode if isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts) else None

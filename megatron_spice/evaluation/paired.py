"""Has a score changed? The same questions answered by two models, compared question by question.

The difference of two scores' intervals says too little: both were asked the same questions, and an easy one is easy for both. So
marks are subtracted question by question. Where several runs (seeds) of a recipe were trained, both the runs and the questions are
samples, and each has its own uncertainty: of the runs by Student's distribution over their means, which for three of them is wide,
and of the questions by the same over theirs, less what is chance in single answers, which the first already holds. The interval is
as far from the mean as both together, as the sides of a right angle. (A bootstrap over three runs cannot leave the range of their
means: where runs differ it holds the truth 88 times in 100 instead of 95; tests/evaluation/test_paired.py counts.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spice.report.change import student
from megatron_spice.telemetry.json_lines import read_json_lines


@dataclass(frozen=True, slots=True)
class Change:
    """Mean of (after - before) over `runs` runs and the `items` questions that all of them have, with its 95 % interval.

    Of a single run the interval is over questions: it says how sure this run's change is, not what another seed would come to.
    `low` and `high` are None where there is a single question, which gives none.
    """

    mean: float
    low: float | None
    high: float | None
    runs: int
    items: int


def marks(log: Path) -> dict[str, float]:
    """The share of right answers to each question, by its id, from a task's log (`log.py`)."""
    answered = [line for line in read_json_lines(log) if "answers" in line]
    return {line["id"]: float(np.mean([answer["correct"] for answer in line["answers"]])) for line in answered}


def change(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Change:
    """Compares `before[i]` with `after[i]`, each question's mark by its id, for every run i.

    Raises:
        ValueError: no run, or no question that all have.
    """
    runs = list(zip(before, after, strict=True))
    shared = set.intersection(*(set(marked) for pair in runs for marked in pair)) if runs else set()
    if not shared:
        raise ValueError(f"{len(runs)} run(s) with no question in common: nothing can be compared")
    items = sorted(shared)
    differences = np.array([[new[item] - old[item] for item in items] for old, new in runs])
    mean = float(differences.mean())
    if len(items) == 1:
        return Change(mean, None, None, len(runs), 1)
    margin = _margin(differences)
    return Change(mean, mean - margin, mean + margin, len(runs), len(items))


def _margin(differences: np.ndarray) -> float:
    """Half of the interval of the mean of differences [runs, questions].

    A difference is taken as mean + run + question + chance. The squares of the runs' means about the whole hold the runs' and
    chance, those of the questions' means the questions' and chance.
    """
    runs, items = differences.shape
    of_runs, of_items = (differences.mean(axis=axis, keepdims=True) - differences.mean() for axis in (1, 0))
    item_error = float((of_items**2).sum()) / (items - 1) / items  # of the mean, squared
    if runs == 1:
        return student(items - 1) * math.sqrt(item_error)
    chance = differences - differences.mean() - of_runs - of_items
    chance_error = float((chance**2).sum()) / ((runs - 1) * (items - 1)) / (runs * items)
    run_error = float((of_runs**2).sum()) / (runs - 1) / runs
    sides = student(runs - 1) * math.sqrt(run_error), student(items - 1) * math.sqrt(max(0.0, item_error - chance_error))
    return math.hypot(*sides)

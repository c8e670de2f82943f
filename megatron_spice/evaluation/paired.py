"""Has a score changed? The same questions answered by two models, compared question by question.

The difference of two scores' intervals says too little: both were asked the same questions, and an easy one is easy for both. So
questions are drawn again in pairs, and where several runs (seeds) of a recipe were trained, runs too: an interval over three seeds
alone is the spread of three numbers, one over questions alone takes the one run for the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spice.telemetry.json_lines import read_json_lines

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Change:
    """Mean of (after - before) over `runs` runs and the `items` questions that all of them have, with its 95 % interval."""

    mean: float
    low: float
    high: float
    runs: int
    items: int


def marks(log: Path) -> dict[str, float]:
    """The share of right answers to each question, by its id, from a task's log (`log.py`)."""
    answered = [line for line in read_json_lines(log) if "answers" in line]
    return {line["id"]: float(np.mean([answer["correct"] for answer in line["answers"]])) for line in answered}


def change(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], seed: int = 0) -> Change:
    """Compares `before[i]` with `after[i]`, each question's mark by its id, for every run i.

    The interval is of a bootstrap over both runs and questions: each resample draws runs, and questions for all of them.

    Raises:
        ValueError: no run, or no question that all have.
    """
    runs = list(zip(before, after, strict=True))
    shared = set.intersection(*(set(marked) for pair in runs for marked in pair)) if runs else set()
    if not shared:
        raise ValueError(f"{len(runs)} run(s) with no question in common: nothing can be compared")
    items = sorted(shared)
    differences = np.array([[new[item] - old[item] for item in items] for old, new in runs])
    rng = np.random.default_rng(seed)
    # A mean over the runs drawn is a weighting of runs, which spares copies of the matrix.
    weights = rng.multinomial(len(runs), [1 / len(runs)] * len(runs), size=RESAMPLES) / len(runs)
    drawn = rng.integers(0, len(items), size=(RESAMPLES, len(items)))
    means = np.array([(weight @ differences)[picks].mean() for weight, picks in zip(weights, drawn)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Change(float(differences.mean()), float(low), float(high), len(runs), len(items))

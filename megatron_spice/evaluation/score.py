"""Scores with 95 % intervals: Wilson's for shares of right answers, and one over items where an item has several answers.

With one answer an item the score is a share of independent trials. With k answers it is not: the answers to one question go
together, so questions are what is counted [avg@k]. Student's interval over their means alone would have no width where all
are alike, as 0 right of 30 questions, and be too narrow near there: so, as Agresti and Coull do for shares, one more question
that is all right and one that is all wrong are put beside them. Simulated, it then holds the truth 94 times in 100 or more
in every population that was tried, and more often than it says where questions hardly differ (`tests/evaluation/test_score.py`).
The mean of columns takes their errors as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spice.report.change import student

Z = 1.959963984540054  # of a normal distribution, 95 %


@dataclass(frozen=True, slots=True)
class Score:
    """A mean in [0, 1] with the ends of its 95 % interval, of `items` questions with `samples` answers each."""

    mean: float
    low: float
    high: float
    items: int
    samples: int


def score(correct: Sequence[Sequence[bool]]) -> Score:
    """The score of items' verdicts, [item][sample], as many samples an item.

    Raises:
        ValueError: no item, or items with different numbers of samples.
    """
    counts = {len(item) for item in correct}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"items have {sorted(counts) or 'no'} answers each, expected one number for all")
    samples = counts.pop()
    means = np.array([sum(item) / samples for item in correct])
    if samples == 1:
        return Score(float(means.mean()), *wilson(int(means.sum()), len(means)), len(means), 1)
    return Score(float(means.mean()), *over_items(means), len(means), samples)


def over_items(means: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of a population of items, from the means of some, [items] in [0, 1]."""
    beside = np.append(means, [0.0, 1.0])
    middle, error = float(beside.mean()), float(beside.std(ddof=1)) / math.sqrt(len(beside))
    half = student(len(beside) - 1) * error
    return max(0.0, middle - half), min(1.0, middle + half)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Ends of Wilson's 95 % interval of a share."""
    share = successes / trials
    middle = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of(scores: Sequence[Score]) -> Score:
    """The unweighted mean of columns; each interval stands for twice its standard error."""
    mean = sum(each.mean for each in scores) / len(scores)
    half = math.sqrt(sum(((each.high - each.low) / 2) ** 2 for each in scores)) / len(scores)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), sum(each.items for each in scores), 0)

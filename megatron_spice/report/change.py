"""By how much a number changed over a run, and how sure that is.

The first iterations are compared with the last: ten at either end, fewer in a short run, a fifth of a long one. An iteration
plays few passages, so its numbers scatter, and neighbours resemble each other: with a lag-1 correlation r, n iterations are
worth n (1 - r) / (1 + r). Scatter and r come from the residuals about a parabola through the whole run (a line, if it is short),
so that learning itself, which may be slow at first and fast at last, is not taken for noise.
Over several seeds the seeds are the sample, and nothing has to be assumed about iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 6  # iterations with a value, below which nothing is said
STRONGEST_CORRELATION = 0.99
FEWEST_FOR_BEND = 12  # iterations to fit a parabola to


@dataclass(frozen=True)
class Change:
    """A change with its 95 % interval.

    Attributes:
        first, last: means at both ends.
        low, high: the interval of `last - first`; infinite where a single pair of values gives none.
        compared: iterations at either end.
        seeds: runs it is the mean of.
    """

    first: float
    last: float
    low: float
    high: float
    compared: int
    seeds: int = 1

    @property
    def difference(self) -> float:
        return self.last - self.first

    @property
    def direction(self) -> int:
        """+1 or -1 where the interval says so, 0 where it holds zero."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def end_of(iterations: int) -> int:
    """How many of so many iterations are one end of a run."""
    return max(1, min(max(3, iterations // 3), max(10, iterations // 5), iterations // 2))


def change(values: np.ndarray) -> Change | None:
    """From one end of a run's values [iterations] to the other; None if fewer than `SHORTEST` are known."""
    known = values[np.isfinite(values)]
    if len(known) < SHORTEST:
        return None
    count = end_of(len(known))
    return between(known, slice(0, count), slice(-count, None))


def between(known: np.ndarray, earlier: slice, later: slice, looked_at: int = 1, degree: int | None = None) -> Change:
    """From one part of a run's known values [iterations] to another, with its interval.

    Args:
        looked_at: pairs of parts of which this one was picked; the interval holds for all of them together (Bonferroni).
        degree: of the polynomial that the values scatter about; None: as for the ends of a run.
    """
    first, last = known[earlier], known[later]
    residuals, correlation, parameters = _noise(known, degree)
    worth = (1 - correlation) / (1 + correlation)
    # What was fitted has taken some of the scatter with it.
    lost = len(known) / max(len(known) - parameters / worth, len(known) / 4)
    errors = [float((residuals[part] ** 2).mean()) * lost / max(1.0, len(known[part]) * worth) for part in (earlier, later)]
    freedom = max(1.0, len(known) * worth - parameters - 1)  # one for the correlation
    error, difference = math.sqrt(sum(errors)), float(last.mean() - first.mean())
    margin = student(freedom, 0.05 / looked_at) * error if error else 0.0
    return Change(float(first.mean()), float(last.mean()), difference - margin, difference + margin, min(len(first), len(last)))


def _noise(values: np.ndarray, degree: int | None) -> tuple[np.ndarray, float, int]:
    """Residuals of the values [iterations] about a smooth course, their lag-1 correlation, and the course's parameters."""
    if degree is None:
        degree = 2 if len(values) >= FEWEST_FOR_BEND else 1
    places = np.linspace(-1, 1, len(values))
    residuals = values - np.polyval(np.polyfit(places, values, degree), places)
    residuals[np.abs(residuals) < 1e-12 * (np.abs(values).max() or 1.0)] = 0.0  # rounding
    power = float((residuals**2).sum())
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / power if power else 0.0
    # About a course fitted to the same values the estimate is too small, by about k (1 + 2 r) / n for k parameters;
    # tests/report/test_change.py counts how often the interval then holds the truth.
    part = (degree + 1) / len(values)
    correlation = (correlation + part) / (1 - min(2 * part, 0.5))
    return residuals, min(max(correlation, 0.0), STRONGEST_CORRELATION), degree + 1


def change_over_seeds(runs: Sequence[np.ndarray]) -> Change | None:
    """The mean change of several runs of one recipe, each [iterations]; of a single run, `change`."""
    changes = [found for values in runs if (found := change(values)) is not None]
    if len(changes) < 2:
        return changes[0] if changes else None
    low, high = mean_interval([each.difference for each in changes])
    first, last = (float(np.mean([getattr(each, end) for each in changes])) for end in ("first", "last"))
    return Change(first, last, low, high, min(each.compared for each in changes), len(changes))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values; infinite for a single one."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    margin = student(len(values) - 1) * error
    return mean - margin, mean + margin


def difference_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(theirs) - mean(ours), two independent samples (Welch); infinite if either has a single value."""
    if min(len(ours), len(theirs)) < 2:
        return -math.inf, math.inf
    errors = [float(np.var(part, ddof=1)) / len(part) for part in (ours, theirs)]
    difference, error = float(np.mean(theirs) - np.mean(ours)), math.sqrt(sum(errors))
    squares = sum(part**2 / (len(values) - 1) for part, values in zip(errors, (ours, theirs)))
    margin = student(sum(errors) ** 2 / squares) * error if squares else 0.0
    return difference - margin, difference + margin


def student(freedom: float, outside: float = 0.05) -> float:
    """What |t| of Student's distribution with `freedom` >= 1 degrees of freedom exceeds with probability `outside`, to 4 digits.

    With t = sqrt(freedom) tan(a) its density is proportional to cos(a) ** (freedom - 1), which is summed up here.
    """
    freedom = min(freedom, 2e4)  # beyond, the same to 5 digits, and the density is still wider than a step of the sum
    angles = np.linspace(0.0, math.pi / 2, 20001)
    density = np.cos(angles) ** (freedom - 1.0)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(1 - outside, below / below[-1], angles)))


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and its `reach` neighbours on either side, as far as there are, leaving NaN out; [iterations]."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    start, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    amount = counts[end] - counts[start]
    means = (sums[end] - sums[start]) / np.maximum(amount, 1)
    return np.where(amount > 0, means, math.nan)

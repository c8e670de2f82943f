"""Groups of runs against the first of them, by the means of their last iterations.

A seed is one observation: with one seed a group, no interval can be given, and the table says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spice.report.change import difference_interval, end_of, mean_interval
from megatron_spice.report.groups import Group
from megatron_spice.report.runs import Run
from megatron_spice.report.words import number, signed
from megatron_spice.telemetry import progress

COMPARED = (
    (progress.CHALLENGER_REWARD, "Challenger's reward"),
    (progress.VALID, "valid attempts"),
    (progress.MIXED, "tasks at the frontier"),
    (progress.GROUNDED, "answers found in the passage"),
    (progress.PASS_RATE, "pass rate"),
    (progress.REASONER_REWARD, "Reasoner's reward"),
    ("policy/entropy", "entropy"),
    (progress.SPEED, "tokens a second"),
    (progress.WHOLE, "seconds an iteration"),
)


@dataclass(frozen=True)
class Cell:
    """A group's value, its interval over seeds, and the difference from the first group, as text; `clear`: it holds no zero."""

    value: str
    interval: str
    difference: str
    clear: bool


def compare(groups: Sequence[Group]) -> list[tuple[str, list[Cell]]]:
    """A row a metric: (label, a cell for each group)."""
    rows = []
    for metric, label in COMPARED:
        values = [[_late(run.series(metric)) for run in group.runs] for group in groups]
        values = [[value for value in group if math.isfinite(value)] for group in values]
        if any(values):
            rows.append((label, [_cell(group, values[0], place) for place, group in enumerate(values)]))
    for task in dict.fromkeys(score.task for group in groups for run in group.runs for score in run.scores):
        values = [[last for run in group.runs if (last := _last_score(run, task)) is not None] for group in groups]
        rows.append((f"evaluation: {task}", [_cell(group, values[0], place) for place, group in enumerate(values)]))
    return rows


def _last_score(run: Run, task: str) -> float | None:
    """Of the last checkpoint that was evaluated."""
    return next((score.score for score in reversed(run.scores) if score.task == task and score.iteration is not None), None)


def _late(values: np.ndarray) -> float:
    """Mean of the last of the known values."""
    known = values[np.isfinite(values)]
    return float(known[-end_of(len(known)) :].mean()) if len(known) else math.nan


def _cell(ours: list[float], first: list[float], place: int) -> Cell:
    if not ours:
        return Cell("-", "", "", False)
    low, high = mean_interval(ours)
    interval = f"{number(low)} to {number(high)}" if len(ours) > 1 else ""
    value = number(float(np.mean(ours)))
    if not place or not first:
        return Cell(value, interval, "", False)
    low, high = difference_interval(first, ours)
    difference = signed(float(np.mean(ours) - np.mean(first)), number)
    known = math.isfinite(low)
    span = f" ({number(low)} to {number(high)})" if known else " (one seed: may be luck)"
    return Cell(value, interval, difference + span, known and (low > 0 or high < 0))

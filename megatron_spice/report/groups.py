"""Runs side by side: those of one recipe that differ in nothing but the seed make a group, and its spread is the luck.

A setting that only says where a run lies, or on what it ran, does not set it apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spice.report.runs import Run, setting

SEEDS = ("train.seed", "rollout.seed")
SAME_THING = ("run.", "cluster.", "telemetry.", "checkpoint.")
MOST_DIFFERENCES = 3  # settings in a group's name


@dataclass(frozen=True)
class Group:
    """Runs of one recipe; `label` tells them from the other groups of a report."""

    label: str
    runs: Sequence[Run]

    def series(self, metric: str, iterations: np.ndarray) -> list[np.ndarray]:
        """The metric of each run at the given iterations, NaN where it has none; arrays [iterations]."""
        return [placed(run.iterations, run.series(metric), iterations) for run in self.runs]

    def mean(self, metric: str, iterations: np.ndarray) -> np.ndarray:
        """Mean over the runs that have a value, NaN where none has; [iterations]."""
        return mean_of(self.series(metric, iterations))


def placed(own: np.ndarray, values: np.ndarray, iterations: np.ndarray) -> np.ndarray:
    """Values of a run's `own` iterations moved to the places of `iterations`, NaN elsewhere."""
    by_number = dict(zip(own.tolist(), values.tolist()))
    return np.array([by_number.get(number, np.nan) for number in iterations.tolist()], dtype=float)


def mean_of(series: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of several series by place, leaving NaN out."""
    table = np.stack(series)
    known = np.isfinite(table)
    counts = known.sum(axis=0)
    return np.where(counts > 0, np.where(known, table, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. A run without a recipe stands alone."""
    found: dict[object, list[Run]] = {}
    for place, run in enumerate(runs):
        found.setdefault(_essence(run.recipe) if run.recipe else place, []).append(run)
    members = list(found.values())
    labels = [_common_name(group) for group in members]
    if len(set(labels)) < len(labels):
        labels = [f"{label}: {_differing(group[0], runs)}" for label, group in zip(labels, members)]
    if len(set(labels)) < len(labels):
        labels = [f"{place}. {label}" for place, label in enumerate(labels, start=1)]
    return [Group(label, group) for label, group in zip(labels, members)]


def differences(runs: Sequence[Run]) -> list[str]:
    """Keys in which the runs' recipes differ, apart from where they lie."""
    recipes = [run.recipe for run in runs if run.recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if key != "run.dir" and len({setting(recipe.get(key)) for recipe in recipes}) > 1]


def _essence(recipe: dict[str, object]) -> tuple[tuple[str, str], ...]:
    kept: Iterable[str] = (key for key in recipe if key not in SEEDS and not key.startswith(SAME_THING))
    return tuple(sorted((key, setting(recipe[key])) for key in kept))


def _common_name(runs: Sequence[Run]) -> str:
    """What the folders' names have in common, without a dangling "seed"."""
    if len(runs) == 1:
        return runs[0].name
    shared = re.sub(r"[-_. ]*(seed|s)?[-_. ]*$", "", os.path.commonprefix([run.name for run in runs]))
    return shared or runs[0].name


def _differing(run: Run, runs: Sequence[Run]) -> str:
    keys = [key for key in differences(runs) if key not in SEEDS and not key.startswith(SAME_THING)]
    written = [f"{key}={setting(run.recipe[key])}" for key in keys[:MOST_DIFFERENCES] if key in run.recipe]
    return ", ".join(written) or run.folder.as_posix()

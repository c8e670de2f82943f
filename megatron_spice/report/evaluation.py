"""Results of evaluations, read tolerantly: JSON files in a run's folder `evaluation/`, or in folders in it.

    tools/evaluate.py RUN_DIR/checkpoints/iteration_0000008 ... --output RUN_DIR/evaluation/iteration_8

A file says what was evaluated and, for each task, a score with its interval. Which iteration it was is read from the names of
the file and its folder, else from what it says of the checkpoint. Names of fields differ between tools and versions, so several
are understood; a file without a score is named in a notice and otherwise passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SCORE_KEYS = ("score", "accuracy", "mean", "value", "pass_rate")
INTERVAL_KEYS = ("interval", "confidence_interval", "ci", "ci95")
BOUND_KEYS = (("low", "high"), ("lower", "upper"), ("ci_low", "ci_high"))
COUNT_KEYS = ("items", "count", "n", "num_items", "questions")
NAME_KEYS = ("task", "name", "benchmark")
LABEL_KEYS = ("label", "checkpoint", "model", "name", "source")
GROUP_KEYS = ("tasks", "results", "scores")


@dataclass(frozen=True)
class Score:
    """One task's result.

    Attributes:
        label: what was evaluated.
        iteration: of its checkpoint, None when unknown (0: the model before training).
        score, low, high: in percent or as a share, as the file has them; the bounds are None when it has none.
        items: number of questions, None when unknown.
    """

    label: str
    iteration: int | None
    task: str
    score: float
    low: float | None = None
    high: float | None = None
    items: int | None = None


def read_scores(folder: Path) -> tuple[list[Score], list[str]]:
    """All scores of the JSON files in a folder, ordered by iteration, and notices about files that have none."""
    scores: list[Score] = []
    notices: list[str] = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        name = path.relative_to(folder).as_posix()
        try:
            found = list(_scores(json.loads(path.read_text(encoding="utf-8")), name.removesuffix(".json")))
        except (OSError, ValueError) as error:
            notices.append(f"evaluation/{name} cannot be read: {error}.")
            continue
        if not found:
            notices.append(f"evaluation/{name} holds no scores that are understood here.")
        scores += found
    return sorted(scores, key=lambda score: (score.iteration is None, score.iteration or 0)), notices


def _scores(content: object, name: str) -> Iterable[Score]:
    if not isinstance(content, dict):
        return
    label = next((str(content[key]) for key in LABEL_KEYS if isinstance(content.get(key), str)), name)
    iteration = _whole(content, ("iteration",))
    written = re.search(r"iteration_?(\d+)", name) or re.search(r"iteration_?(\d+)", label)
    if iteration is None and written:
        iteration = int(written[1])
    tasks = next((content[key] for key in GROUP_KEYS if isinstance(content.get(key), (dict, list))), None)
    named = tasks.items() if isinstance(tasks, dict) else enumerate(tasks or [])
    for key, entry in named:
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            entry = {"score": entry}
        if not isinstance(entry, dict) or (score := _float(entry, SCORE_KEYS)) is None:
            continue
        task = next((str(entry[name]) for name in NAME_KEYS if isinstance(entry.get(name), str)), str(key))
        low, high = _bounds(entry)
        yield Score(label, iteration, task, score, low, high, _whole(entry, COUNT_KEYS))


def _bounds(entry: dict) -> tuple[float | None, float | None]:
    for key in INTERVAL_KEYS:
        pair = entry.get(key)
        if isinstance(pair, list) and len(pair) == 2:
            pair = {"low": pair[0], "high": pair[1]}
        if isinstance(pair, dict):
            return _bounds(pair)
    for low, high in BOUND_KEYS:
        found = _float(entry, (low,)), _float(entry, (high,))
        if None not in found:
            return found
    return None, None


def _float(entry: dict, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = entry.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _whole(entry: dict, keys: tuple[str, ...]) -> int | None:
    value = _float(entry, keys)
    return int(value) if value is not None and value == int(value) else None

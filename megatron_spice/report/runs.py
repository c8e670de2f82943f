"""A run's folder, read for a report: its metrics, its recipe, its evaluations, and what is wrong with any of them.

Only the metrics are needed. Whatever else is missing or damaged becomes a notice that the report shows, because a report
is wanted most of a run that went wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from megatron_spice.report.evaluation import Score, read_scores
from megatron_spice.telemetry.json_lines import read_json_lines
from megatron_spice.telemetry.run_log import EPISODES_NAME, METRICS_NAME

RECIPE_NAME = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it lies; `name` is the folder's.
        records: its metrics, an iteration each, ascending.
        recipe: settings by dotted key, {} when the folder has no readable recipe.
        scores: results of `tools/evaluate.py`.
        notices: what a reader should know of the files, in sentences.
    """

    folder: Path
    records: Sequence[dict]
    recipe: dict[str, object] = field(default_factory=dict)
    scores: Sequence[Score] = ()
    notices: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def episodes_path(self) -> Path:
        return self.folder / EPISODES_NAME

    @property
    def iterations(self) -> np.ndarray:
        """Numbers of the iterations, int [iterations]."""
        return np.array([record["iteration"] for record in self.records], dtype=int)

    def series(self, metric: str) -> np.ndarray:
        """A metric by iteration, float [iterations], NaN where an iteration has no value."""
        return np.array([_number(record.get(metric)) for record in self.records], dtype=float)

    def metrics(self) -> list[str]:
        """Names of all numbers that any iteration has, in the order in which they are written."""
        names = dict.fromkeys(name for record in self.records for name, value in record.items() if _is_number(value))
        return [name for name in names if name not in ("iteration", "time")]


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        FileNotFoundError: the folder holds no metrics.
        ValueError: they are empty, or a line before the last is broken.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give the folder of a run (run.dir in its recipe)")
    records, notices = _in_order(read_json_lines(path), path)
    if not records:
        raise ValueError(f"{path} is empty: no iteration has ended yet")
    if not path.read_bytes().endswith(b"\n"):
        notices.append(f"The last line of {METRICS_NAME} is only half written and was left out.")
    recipe = _recipe(folder / RECIPE_NAME, notices)
    if not (folder / EPISODES_NAME).is_file():
        notices.append(f"There is no {EPISODES_NAME} (telemetry.episodes), so nothing is known of single questions.")
    scores, complaints = read_scores(folder / "evaluation")
    before = _before(folder, recipe)
    return Run(folder, records, recipe, [*before, *scores], [*notices, *complaints])


def _before(folder: Path, recipe: dict[str, object]) -> list[Score]:
    """What a study found of the model that its runs began with, beside them in `before/`, as scores of iteration 0."""
    asked = [recipe.get(key) for key in ("policy.model", "game.prompt_style", "game.reasoner_max_tokens")]
    if None in asked:
        return []
    scores, _ = read_scores(before_folder(folder.resolve().parent, *asked))
    return [replace(score, iteration=0) for score in scores]


def before_folder(study: Path, model: object, prompt_style: object, reasoner_max_tokens: object) -> Path:
    """Where a study keeps the results of a model before training: runs that ask it in the same way share them."""
    return study / "before" / f"{str(model).strip('/').replace('/', '-')}-{prompt_style}-{reasoner_max_tokens}"


def _in_order(records: list, path: Path) -> tuple[list[dict], list[str]]:
    """The records, iterations ascending. Where one stands twice, as after two writers, the later line counts."""
    kept: dict[int, dict] = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or type(record.get("iteration")) is not int:
            raise ValueError(f"{path}:{number}: not the metrics of an iteration: no whole number 'iteration'")
        kept[record["iteration"]] = record
    notices = []
    if len(kept) < len(records):
        notices.append(f"{len(records) - len(kept)} iterations stand twice in {METRICS_NAME}; the later line of each was taken.")
    numbers = sorted(kept)
    if numbers and numbers[-1] - numbers[0] + 1 > len(numbers):
        notices.append(f"Iterations are missing in {METRICS_NAME}: {len(numbers)} of {numbers[0]} to {numbers[-1]} are there.")
    return [kept[number] for number in numbers], notices


def _recipe(path: Path, notices: list[str]) -> dict[str, object]:
    """Settings by dotted key. Read without checks: the recipe may be of another version."""
    if not path.is_file():
        notices.append(f"There is no {RECIPE_NAME}, so the run's settings are not known.")
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notices.append(f"{RECIPE_NAME} cannot be read ({str(error).splitlines()[0]}), so the run's settings are not known.")
        return {}
    return dict(_flat(recipe)) if isinstance(recipe, dict) else {}


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: object) -> float:
    return float(value) if _is_number(value) and math.isfinite(value) else math.nan


def setting(value: object) -> str:
    """A setting as one would write it in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, default=str)

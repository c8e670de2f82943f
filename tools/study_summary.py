"""What a study found, from the files that its runs, evaluations and matches have left.

A seed is one observation: a recipe's number is the mean of its seeds' with Student's interval, as in a run's report, and of a
single seed there is none. Changes of a score, before to after and from recipe to recipe, are of the same questions in the same
seeds, and their intervals are over both (`evaluation/paired.py`); of a single seed they are over its questions alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_spice.evaluation.paired import change, marks
from megatron_spice.report.change import mean_interval
from megatron_spice.telemetry.json_lines import read_json_lines
from megatron_spice.telemetry.run_log import METRICS_NAME

if TYPE_CHECKING:
    from tools.study import Trained

ENDS = ("reasoner/pass_rate", "challenger/valid_share", "challenger/reward", "challenger/grounded_share", "audit/constant_gold")
LAST = 0.1
"""Share of a run's iterations that its end is averaged over."""


class Outcome(NamedTuple):
    """A run, and the folder with the evaluation of the model that it began with."""

    run: Trained
    before: Path


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By quantity and recipe: each seed's number, their mean with its interval, and the difference from the first recipe; of scores
    also the change since before training and from the first recipe, question by question."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for outcome in outcomes:
        for quantity, value in _numbers(outcome).items():
            found.setdefault(quantity, {}).setdefault(outcome.run.name, {})[outcome.run.seed] = value
    first = outcomes[0].run.name
    seeds = list(dict.fromkeys(outcome.run.seed for outcome in outcomes))
    result: dict[str, Any] = {"seeds": seeds, "compared_with": first, "quantities": {}}
    for quantity, by_recipe in found.items():
        told = result["quantities"][quantity] = {}
        for name, by_seed in by_recipe.items():
            told[name] = {"by_seed": by_seed, **_mean(list(by_seed.values()))}
            both = [seed for seed in by_seed if seed in by_recipe.get(first, {})]
            if name != first and both:
                told[name]["difference"] = _mean([by_seed[seed] - by_recipe[first][seed] for seed in both])
    result["changes"] = {task: _changes(outcomes, task) for task in _tasks(outcomes)}
    return result


def _numbers(outcome: Outcome) -> dict[str, float]:
    """A run's end, its evaluations, and what early and late checkpoints made of each other."""
    run = outcome.run
    lines = read_json_lines(run.folder / METRICS_NAME)
    last = lines[-max(1, round(LAST * len(lines))) :]
    numbers = {name: fmean(line[name] for line in last if name in line) for name in ENDS if any(name in line for line in last)}
    after, before = (_results(folder) for folder in (run.evaluation, outcome.before))
    for task, result in after.items():
        numbers[f"evaluation/{task}"] = result["mean"]
        if task in before:
            numbers[f"evaluation/{task} less before"] = result["mean"] - before[task]["mean"]
    path = run.crossplay / "matrix.json"
    if path.exists():
        for pair in json.loads(path.read_text())["pairs"]:
            if pair["pass_rate"] is not None:
                numbers[f"crossplay/{pair['challenger']} Challenger, {pair['reasoner']} Reasoner"] = pair["pass_rate"]
    return numbers


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "results.json"
    return {task["task"]: task for task in json.loads(path.read_text())["tasks"]} if path.exists() else {}


def _tasks(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(task for outcome in outcomes for task in _results(outcome.run.evaluation)))


def _changes(outcomes: Sequence[Outcome], task: str) -> dict[str, dict[str, Any]]:
    """By recipe: `since_before`, and of all but the first `from_first`, where both logs are there."""
    after: dict[str, dict[int, dict[str, float]]] = {}
    before: dict[str, dict[int, dict[str, float]]] = {}
    for run, folder in outcomes:
        for place, side in ((run.evaluation, after), (folder, before)):
            log = place / _results(place).get(task, {}).get("log", "none")
            if log.is_file():
                side.setdefault(run.name, {})[run.seed] = marks(log)
    first = outcomes[0].run.name
    told: dict[str, dict[str, Any]] = {}
    for name, by_seed in after.items():
        told[name] = {}
        others = {"since_before": before.get(name, {}), **({"from_first": after.get(first, {})} if name != first else {})}
        for word, other in others.items():
            if seeds := [seed for seed in by_seed if seed in other]:
                told[name][word] = asdict(change([other[seed] for seed in seeds], [by_seed[seed] for seed in seeds]))
    return told


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return {"mean": fmean(values), "low": low, "high": high, "seeds": len(values)}


def table(found: dict[str, Any]) -> str:
    """One line a quantity and recipe; then of each task, how it changed."""
    lines = []
    first = found["compared_with"]
    for quantity, by_recipe in found["quantities"].items():
        lines.append(quantity)
        for name, told in by_recipe.items():
            line = f"  {name:24} {told['mean']:8.4f} {_interval(told, '.4f')} over {told['seeds']} seed(s)"
            if other := told.get("difference"):
                line += f"; less {first}: {_signed(other)}"
            lines.append(line)
    words = {"since_before": "since before training", "from_first": f"less {first}"}
    for task, by_recipe in found["changes"].items():
        lines.append(f"change of {task}, question by question")
        for name, told in by_recipe.items():
            for word, each in told.items():
                over = f"{each['items']} questions" + (f" x {each['runs']} seeds" if each["runs"] > 1 else " of one seed")
                lines.append(f"  {name:24} {words[word]:24} {_signed(each)} over {over}")
    return "\n".join(lines) + "\n"


def _signed(told: dict[str, Any]) -> str:
    return f"{told['mean']:+.4f} {_interval(told, '+.4f')}"


def _interval(told: dict[str, Any], form: str) -> str:
    if told["low"] is None:
        return "[no interval]"
    return f"[{told['low']:{form}}, {told['high']:{form}}]"

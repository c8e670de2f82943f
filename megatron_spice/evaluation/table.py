"""The results as a table in the order of the paper's columns, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_spice.evaluation.run import Result
from megatron_spice.evaluation.score import mean_of
from megatron_spice.evaluation.tasks import PAPER

RESULTS = "results.json"


def table(results: Sequence[Result]) -> str:
    """One line a column of the results: score in percent, its 95 % interval, and what it is of. The paper's overall score is
    the unweighted mean of its eleven columns, and is there only when they all are."""
    lines = [f"{'':14} {'score':>6}  {'95 %':>13}  {'items':>6}  {'cut':>5}  {'none':>5}  {'tokens':>7}"]
    for result in results:
        found, tokens = result.score, result.mean_tokens
        samples = f" x{found.samples}" if found.samples > 1 else ""
        too_long = f"  {result.too_long} too long for the context, counted as wrong" if result.too_long else ""
        lines.append(
            f"{result.benchmark.column:14} {found.mean:6.1%}  {_interval(found.low, found.high):>13}  {found.items:>6}  "
            f"{result.cut:5.0%}  {result.unanswered:5.0%}  {'' if tokens is None else f'{tokens:.0f}':>7}{samples}{too_long}"
        )
    if (mean := overall(results)) is not None:
        lines.append(f"{'Overall':14} {mean.mean:6.1%}  {_interval(mean.low, mean.high):>13}")
    return "\n".join(line.rstrip() for line in lines)


def overall(results: Sequence[Result]):  # noqa: ANN201 (Score or None)
    """The mean of the paper's eleven columns, None unless all are there."""
    names = {benchmark.name for benchmark in PAPER}
    of_paper = [result.score for result in results if result.benchmark.name in names]
    return mean_of(of_paper) if len(of_paper) == len(names) else None


def _interval(low: float, high: float) -> str:
    return f"{low * 100:.1f} to {high * 100:.1f}"


def write(folder: Path, about: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """results.json: what was evaluated, each task, and the overall score; replaced whole."""
    mean = overall(results)
    content = {
        **about,
        "tasks": [result.as_json() for result in results],
        "overall": None if mean is None else {"mean": mean.mean, "low": mean.low, "high": mean.high},
    }
    path = folder / RESULTS
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path

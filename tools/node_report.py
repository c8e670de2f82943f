"""What slurm/benchmark.sh writes: one JSON file in a fixed form, and how two of them are compared."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmark_options import columns, refuse
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_spice.report.change import difference_interval

FORMAT = 1
FEWEST = 3
"""Values on either side, below which nothing is said about a change: how much two values scatter, nobody knows from them."""
EXPLANATION = (
    "geometric means of the iterations; 95 %: Student's interval of their ratio (Welch), outside of which lies one in twenty of what has "
    "not changed. Other nodes or another day make a difference besides."
)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Measurement(_Form):
    """Values of the timed iterations, in order; `better` says which way is up."""

    values: list[float]
    unit: str
    better: Literal["less", "more"]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def mean(self) -> float:
        """The geometric one."""
        return math.exp(statistics.fmean(map(math.log, self.values)))


class Count(_Form):
    """One number of nodes or ranks. `suites`: policy, sync, rollout, iteration, checkpoint, each with its measurements."""

    count: int
    ranks: int
    passages: int
    suites: dict[str, dict[str, Measurement]]
    phases: dict[str, float]
    predicted: dict[str, float]
    efficiency: float


class Report(_Form):
    """A whole benchmark; everything that has to be the same for two of them to be compared is in it."""

    format: Literal[1] = FORMAT
    date: str
    command: str
    revision: str
    seed: int
    unit: Literal["nodes", "ranks"]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    recipe: str
    counts: list[Count]


def read_report(path: Path) -> Report:
    """A file that slurm/benchmark.sh wrote; ends with a message if it is none."""
    try:
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        refuse(f"{path} is no result of slurm/benchmark.sh: {str(error).splitlines()[0]}")


def ratio_bounds(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """after / before of the geometric means, and its 95 % interval: Student's of their logarithms, each side with a scatter of its own
    (Welch). Infinitely wide where a side has a single value."""
    logs = [[math.log(value) for value in side] for side in (before, after)]
    low, high = difference_interval(*logs)
    return math.exp(statistics.fmean(logs[1]) - statistics.fmean(logs[0])), math.exp(low), math.exp(high)


def verdict(mine: Measurement, its: Measurement) -> str:
    """What a comparison says: "better", "worse", "" where it may be chance, or that there is too little to say."""
    if min(len(mine.values), len(its.values)) < FEWEST:
        return f"below {FEWEST} values"
    middle, low, high = ratio_bounds(mine.values, its.values)
    if low <= 1.0 <= high:
        return ""
    return "better" if (middle < 1.0) == (mine.better == "less") else "worse"


def comparison(first: Report, second: Report) -> str:
    """Ratios second / first of everything that both have measured, with intervals and what they say."""
    lines = [f"{first.revision} of {first.date} against {second.revision} of {second.date}"]
    for name in ("machine", "versions", "recipe", "seed", "unit"):
        if getattr(first, name) != getattr(second, name):
            lines.append(f"warning: they differ in {name}")
    rows = [[first.unit, "suite", "measurement", "first", "second", "ratio", "95 %", ""]]
    theirs = {count.count: count for count in second.counts}
    for count in first.counts:
        other = theirs.get(count.count)
        for suite, measurements in count.suites.items():
            for name, mine in measurements.items():
                its = other.suites.get(suite, {}).get(name) if other else None
                if its is None or not mine.values or not its.values or min(*mine.values, *its.values) <= 0:
                    continue
                middle, low, high = ratio_bounds(mine.values, its.values)
                rows.append([
                    str(count.count), suite, f"{name} [{mine.unit}]", f"{mine.mean:.4g}", f"{its.mean:.4g}", f"{middle:.3f}",
                    f"{low:.3f} to {high:.3f}" if math.isfinite(high) else "-", verdict(mine, its),
                ])  # fmt: skip
    return "\n".join([*lines, columns(rows), EXPLANATION])

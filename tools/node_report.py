"""What slurm/benchmark.sh writes: one JSON file in a fixed form, and how two of them are compared."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmark_options import columns, refuse
from pydantic import BaseModel, ConfigDict, ValidationError

FORMAT = 1
DRAWS = 1000


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


def ratio_bounds(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """after / before of the medians, and what 95 of 100 redraws of the iterations lie between."""
    rng = random.Random(seed)
    drawn = sorted(
        statistics.median(rng.choices(after, k=len(after))) / statistics.median(rng.choices(before, k=len(before))) for _ in range(DRAWS)
    )
    middle = statistics.median(after) / statistics.median(before)
    return middle, drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]


def comparison(first: Report, second: Report) -> str:
    """Ratios second / first of everything that both have measured, with noise bounds and what they say."""
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
                if its is None or not mine.values or not its.values or not mine.median or min(mine.values) <= 0:
                    continue
                middle, low, high = ratio_bounds(mine.values, its.values)
                changed = low > 1.0 or high < 1.0
                verdict = "" if not changed else "better" if (middle < 1.0) == (mine.better == "less") else "worse"
                rows.append([
                    str(count.count), suite, f"{name} [{mine.unit}]", f"{mine.median:.4g}", f"{its.median:.4g}", f"{middle:.3f}",
                    f"{low:.3f} to {high:.3f}", verdict,
                ])  # fmt: skip
    return "\n".join([*lines, columns(rows)])

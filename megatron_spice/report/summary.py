"""A run in a few lines, for the terminal."""

from __future__ import annotations

import numpy as np

from megatron_spice.report.change import end_of
from megatron_spice.report.runs import Run
from megatron_spice.telemetry import progress

SHOWN = (
    progress.VALID, progress.GROUNDED, progress.PASS_RATE, progress.MIXED, progress.CHALLENGER_REWARD, progress.REASONER_REWARD,
    *progress.DRIFT, progress.SPEED,
)  # fmt: skip


def summary(run: Run) -> str:
    """First against last iterations, as a small table, and where the time went."""
    total = len(run.records)
    count = end_of(total)
    lines = [f"{run.name}: {total} iterations; means of the first and the last {count}:"]
    for metric in SHOWN:
        values = run.series(metric)
        if np.isfinite(values).any():
            lines.append(f"  {metric:28s} {_mean(values[:count]):>9s} -> {_mean(values[-count:]):>9s}")
    whole = np.nansum(run.series(progress.WHOLE))
    if whole > 0:
        names = [name for name in run.metrics() if name.startswith(progress.SECONDS) and name != progress.WHOLE]
        shares = [f"{name.removeprefix(progress.SECONDS)} {np.nansum(run.series(name)) / whole:.1%}" for name in names]
        lines.append(f"{whole / 60:.1f} minutes of iterations: {', '.join(shares)}")
    return "\n".join(lines)


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    mean = float(known.mean())
    return f"{mean:.3f}" if abs(mean) < 100 else f"{mean:.0f}"

#!/usr/bin/env python3
"""A figure and a short summary of a run, from its metrics.jsonl.

    python tools/report.py runs/quickstart            # writes runs/quickstart/report.png

One iteration plays few passages, so its shares are noisy: each line is shown faintly as it was, and boldly as a running
mean over the last iterations. Colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.telemetry import progress  # noqa: E402
from megatron_spice.telemetry.json_lines import read_json_lines  # noqa: E402
from megatron_spice.telemetry.run_log import METRICS_NAME  # noqa: E402

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #F0E442 #D55E00".split()
PHASE_COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED]
OTHER_COLOUR = "#999999"
COMPARED = 5  # iterations at either end that the summary compares

# title, vertical axis, limits (None: from the data), lines as (metric, label, colour)
PANELS = [
    ("Challenger: valid attempts", "share of attempts", (0, 1), [(progress.VALID, "valid", BLUE)]),
    (
        "Challenger: answers found in the passage",
        "share of valid attempts",
        (0, 1),
        [(progress.GROUNDED, "grounded", GREEN)],
    ),
    ("Reasoner: pass rate", "share of answers", (0, 1), [(progress.PASS_RATE, "correct", ORANGE)]),
    (
        "Tasks that some answers pass and some fail",
        "share of tasks",
        (0, 1),
        [(progress.MIXED, "mixed", PURPLE)],
    ),
    (
        "Mean reward",
        "reward",
        None,
        [(progress.CHALLENGER_REWARD, "Challenger", BLUE), (progress.REASONER_REWARD, "Reasoner", ORANGE)],
    ),
    (
        "Log-prob drift, |engine - policy|",
        "nats a token",
        None,
        [(progress.DRIFT[0], "mean", BLUE), (progress.DRIFT[1], "99th percentile", RED)],
    ),
]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.png", help="figure to write [RUN_DIR/report.png]")
    args = parser.parse_args(arguments)
    output = args.output or args.run_dir / "report.png"
    try:
        records = load(args.run_dir)
        draw(records, args.run_dir.name, output)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(summary(records))
    print(f"figure: {output}")
    return 0


def load(run_dir: Path) -> list[dict]:
    """The run's metrics, an iteration a record.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are empty or broken.
    """
    path = run_dir / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give the folder of a run (run.dir in its recipe)")
    records = read_json_lines(path)
    if not records:
        raise ValueError(f"{path} is empty: no iteration has ended yet")
    return records


def series(records: list[dict], name: str) -> np.ndarray:
    """One metric by iteration, float [iterations], NaN where an iteration has no value."""
    return np.array([math.nan if record.get(name) is None else record[name] for record in records], dtype=float)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window` - 1 before it, as far as there are, leaving NaN out; [iterations]."""
    means = np.full(len(values), math.nan)
    for end in range(1, len(values) + 1):
        recent = values[max(end - window, 0) : end]
        recent = recent[~np.isnan(recent)]
        if len(recent):
            means[end - 1] = recent.mean()
    return means


def draw(records: list[dict], title: str, output: Path) -> None:
    """Write the figure of a run's records."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    iterations = series(records, "iteration")
    window = max(1, min(10, len(records) // 5))
    figure, axes = plt.subplots(3, 3, figsize=(15, 10.5), layout="constrained")
    places = list(axes.flat)
    for axis, (name, unit, limits, lines) in zip(places, PANELS):
        _draw_lines(axis, iterations, [(series(records, key), label, colour) for key, label, colour in lines], window)
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_ylabel(unit)
        if limits:
            axis.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
    _draw_phases(places[6], records, iterations)
    _draw_lines(places[7], iterations, [(series(records, progress.SPEED), "tokens", SKY)], window)
    places[7].set_title("Speed", loc="left", fontsize=11)
    places[7].set_ylabel("tokens a second")
    _draw_lines(places[8], iterations, [(series(records, "policy/grad_norm"), "gradient norm", GREEN)], window)
    places[8].set_title("Gradient norm", loc="left", fontsize=11)
    for axis in (places[5], places[7], places[8]):
        axis.set_ylim(bottom=0)
    for axis in places:
        axis.set_xlabel("iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    smooth = f"bold: mean of the last {window} iterations" if window > 1 else "one point an iteration"
    figure.suptitle(f"{title}: {len(records)} iterations ({smooth})", fontsize=13)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _draw_lines(axis, iterations: np.ndarray, lines: list[tuple[np.ndarray, str, str]], window: int) -> None:
    shown = [line for line in lines if not np.isnan(line[0]).all()]
    for values, label, colour in shown:
        means = running_mean(values, window)
        if window > 1:
            axis.plot(iterations, values, color=colour, alpha=0.3, linewidth=1)
        marker = "o" if len(values) < 15 else None
        axis.plot(iterations, means, color=colour, linewidth=2.2, marker=marker, markersize=4, label=label)
    if len(shown) > 1:
        axis.legend(frameon=False, fontsize=9)
    if not shown:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=OTHER_COLOUR)


def _draw_phases(axis, records: list[dict], iterations: np.ndarray) -> None:
    names = list(dict.fromkeys(name for record in records for name in progress.phase_seconds(record)))
    names.sort(key=lambda name: name == "other")  # on top of the stack
    axis.set_title("Time of an iteration by phase", loc="left", fontsize=11)
    axis.set_ylabel("seconds")
    if not names:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=OTHER_COLOUR)
        return
    below = np.zeros(len(records))
    for place, name in enumerate(names):
        seconds = np.nan_to_num(series(records, progress.SECONDS + name))
        colour = OTHER_COLOUR if name == "other" else PHASE_COLOURS[place % len(PHASE_COLOURS)]
        axis.bar(iterations, seconds, bottom=below, width=0.9, color=colour, label=name)
        below += seconds
    axis.set_ylim(0, below.max() * 1.3 or 1)  # room for the legend
    axis.legend(frameon=False, fontsize=9, ncols=4, loc="upper left")


def summary(records: list[dict]) -> str:
    """First against last iterations, as a small table, and where the time went."""
    count = min(COMPARED, max(len(records) // 2, 1))
    lines = [f"{len(records)} iterations; means of the first and the last {count}:"]
    named = [(key, label) for *_, panel in PANELS for key, label, _ in panel] + [(progress.SPEED, "tokens a second")]
    for key, _ in named:
        values = series(records, key)
        first, last = _mean(values[:count]), _mean(values[-count:])
        if first is not None or last is not None:
            lines.append(f"  {key:28s} {_number(first):>9s} -> {_number(last):>9s}")
    whole = np.nansum(series(records, progress.WHOLE))
    if whole > 0:
        names = dict.fromkeys(name for record in records for name in progress.phase_seconds(record))
        shares = [f"{name} {np.nansum(series(records, progress.SECONDS + name)) / whole:.1%}" for name in names]
        lines.append(f"{whole / 60:.1f} minutes of iterations: {', '.join(shares)}")
    return "\n".join(lines)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Figures of benchmarks over a number of ranks or nodes: scaling efficiency, and where the seconds go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00", "#999999"]


def scaling_figure(
    path: Path, counts: Sequence[int], efficiencies: Sequence[float], phases: Sequence[Mapping[str, float]], unit: str
) -> None:
    """Writes a PNG with two panels: efficiency by count beside the ideal, and seconds by phase, stacked.

    Args:
        counts: of ranks or nodes (`unit` says which), rising.
        phases: seconds by name for each count.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    places = range(len(counts))
    left.axhline(1.0, color="#999999", linewidth=1, linestyle="--")
    left.plot(places, efficiencies, marker="o", color=COLOURS[0])
    for place, efficiency in zip(places, efficiencies):
        left.annotate(f"{efficiency:.2f}", (place, efficiency), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    left.set(title="Scaling efficiency", xlabel=unit, ylabel="efficiency", ylim=(0, max(1.15, 1.1 * max(efficiencies))))
    bottom = [0.0] * len(counts)
    names = list(dict.fromkeys(name for each in phases for name in each))
    for name, colour in zip(names, COLOURS * len(names)):
        heights = [each.get(name, 0.0) for each in phases]
        right.bar(places, heights, 0.6, bottom, label=name, color=colour)
        bottom = [low + high for low, high in zip(bottom, heights)]
    right.set(title="Seconds by phase", xlabel=unit, ylabel="seconds", ylim=(0, 1.2 * max(bottom)))
    right.legend(fontsize=8, ncols=4, loc="upper center")
    for axes in (left, right):
        axes.set_xticks(list(places), [str(count) for count in counts])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

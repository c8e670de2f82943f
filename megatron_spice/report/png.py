"""The page's figures as PNG files, for papers and slides: a file each, or all on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from megatron_spice.report.figure import COLOURS, Curves, Dots, Figure, Heat, Stack

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of Agg, which needs no display)
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

SHEET_COLUMNS = 3
DOTS_PER_INCH = 150


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes each figure to `<its name>.png` in the folder, which is made if need be; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        picture, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        paint(axis, figure)
        paths.append(folder / f"{figure.name}.png")
        picture.savefig(paths[-1], dpi=DOTS_PER_INCH)
        plt.close(picture)
    return paths


def save_sheet(figures: Sequence[Figure], title: str, path: Path) -> None:
    """Writes all figures on one sheet."""
    rows = math.ceil(len(figures) / SHEET_COLUMNS)
    picture, axes = plt.subplots(rows, SHEET_COLUMNS, figsize=(15, 3.5 * rows), layout="constrained", squeeze=False)
    for axis, figure in zip(axes.flat, figures):
        paint(axis, figure)
    for axis in axes.flat[len(figures) :]:
        axis.set_axis_off()
    picture.suptitle(title, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100)
    plt.close(picture)


def paint(axis, figure: Figure) -> None:
    """Draws a figure into matplotlib's axes."""
    {Curves: _curves, Stack: _stack, Heat: _heat, Dots: _dots}[type(figure)](axis, figure)
    # A dollar sign in a name of a run would begin a formula.
    axis.set_title(_plain(figure.title), loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    if not isinstance(figure, Dots):
        axis.set_xlabel("iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _curves(axis, figure: Curves) -> None:
    for line in figure.lines:
        colour = COLOURS[line.colour]
        for faint in line.faint:
            style = {"marker": ".", "linestyle": "none"} if len(line.faint) == 1 else {"linewidth": 0.9}
            axis.plot(figure.iterations, faint, color=colour, alpha=0.35, **style)
        axis.plot(figure.iterations, line.smooth, color=colour, linewidth=2.2, label=_plain(line.label))
    if figure.limits[0] is not None:
        axis.set_ylim(bottom=figure.limits[0])
    axis.set_ylabel(figure.unit)
    axis.grid(axis="y", alpha=0.3)
    if len(figure.lines) > 1:
        axis.legend(frameon=False, fontsize=8)


def _stack(axis, figure: Stack) -> None:
    below = np.zeros(len(figure.iterations))
    for label, values, colour in figure.layers:
        axis.bar(figure.iterations, values, bottom=below, width=0.92, color=COLOURS[colour], label=_plain(label))
        below = below + values
    axis.set_ylim(0, figure.top * 1.25)  # room for the legend
    axis.set_ylabel(figure.unit)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _heat(axis, figure: Heat) -> None:
    shades = LinearSegmentedColormap.from_list(figure.colour, ["#ffffff", COLOURS[figure.colour]])
    edges = np.append(figure.iterations - 0.5, figure.iterations[-1] + 0.5)
    rows = np.arange(len(figure.rows) + 1) - 0.5
    drawn = axis.pcolormesh(edges, rows, np.ma.masked_invalid(figure.shares), cmap=shades, vmin=0.0, vmax=1.0)
    axis.set_yticks(range(len(figure.rows)), figure.rows, fontsize=8)
    axis.figure.colorbar(drawn, ax=axis, label=figure.unit)


def _dots(axis, figure: Dots) -> None:
    for place, (_, score, low, high, colour) in enumerate(figure.rows):
        if low is not None and high is not None:
            axis.plot([low, high], [place, place], color=COLOURS[colour], linewidth=1.8)
        axis.plot([score], [place], "o", color=COLOURS[colour], markersize=7)
    axis.set_yticks(range(len(figure.rows)), [_plain(row[0]) for row in figure.rows], fontsize=9)
    axis.invert_yaxis()
    axis.margins(y=0.15)
    axis.set_xlim(*figure.limits)
    axis.set_xlabel(figure.unit)
    axis.grid(axis="x", alpha=0.3)

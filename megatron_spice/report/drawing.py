"""Figures as shapes for the page: paths in a square of 1000 by 1000 that the page stretches to whatever width it has.

Nothing in the square is text, and strokes do not scale, so that the same paths serve a phone and a wide screen without a
script; labels are HTML beside them, placed in percent. The numbers behind a figure go into a table and to page.js.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_spice.report.figure import Curves, Dots, Figure, Heat, Stack
from megatron_spice.report.words import number

SIZE = 1000
MOST_COLUMNS = 120  # more would be thinner than a pixel or two on a phone
MOST_ROWS = 60  # of a table


@dataclass(frozen=True)
class Shape:
    """An SVG path: `kind` is its CSS class, `colour` a name of `figure.COLOURS`."""

    path: str
    kind: str
    colour: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """A figure, ready for the template.

    Attributes:
        y_ticks, x_ticks: (percent from below or from the left, label).
        legend: (label, colour) of each series in `data`.
        data: {"x": iterations, "y": [values of each series]} for page.js; None where there is nothing to move along.
        table: header and rows of text.
        summary: one sentence that says what is to be seen.
    """

    figure: Figure
    shapes: Sequence[Shape]
    y_ticks: Sequence[tuple[float, str]]
    x_ticks: Sequence[tuple[float, str]]
    legend: Sequence[tuple[str, str]]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]
    summary: str
    data: dict | None = None
    labels: Sequence[str] = field(default_factory=tuple)

    @property
    def kind(self) -> str:
        return type(self.figure).__name__.lower()


def draw(figure: Figure) -> Drawing:
    """The drawing of any figure."""
    if isinstance(figure, Curves):
        return _curves(figure)
    if isinstance(figure, Stack):
        return _stack(figure)
    return _heat(figure) if isinstance(figure, Heat) else _dots(figure)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count + 0.01)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def columns(iterations: np.ndarray) -> list[np.ndarray]:
    """Places of neighbouring iterations that share a column; [columns] arrays."""
    return np.array_split(np.arange(len(iterations)), min(len(iterations), MOST_COLUMNS))


def sparkline(values: np.ndarray) -> str:
    """A path of the values [iterations] that fills the square from its smallest to its largest; "" without any."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    low, high = float(known.min()), float(known.max())
    return _path(np.linspace(0, SIZE, len(values)) if len(values) > 1 else np.array([SIZE / 2.0]), values, low, high)


def _curves(figure: Curves) -> Drawing:
    everything = np.concatenate([array for line in figure.lines for array in (line.smooth, *line.faint)])
    low, high = _limits(everything[np.isfinite(everything)], figure)
    x = _across(figure.iterations)
    shapes = []
    for line in figure.lines:
        for faint in line.faint:
            scattered = len(line.faint) == 1
            shapes.append(Shape((_dots_path if scattered else _path)(x, faint, low, high), "dots" if scattered else "thin", line.colour))
    shapes += [Shape(_path(x, line.smooth, low, high), "line", line.colour) for line in figure.lines]
    series = [(line.label, line.values, line.colour) for line in figure.lines]
    zero = [Shape(f"M0 {_up(0, low, high)}H{SIZE}", "zero", "neutral")] if low < 0 < high else []
    return Drawing(
        figure, zero + shapes, _y_ticks(low, high), _x_ticks(figure.iterations), [(label, colour) for label, _, colour in series],
        _table(figure.iterations, series), _summary(figure.title, figure.iterations, series), _data(figure.iterations, series),
    )  # fmt: skip


def _stack(figure: Stack) -> Drawing:
    groups = columns(figure.iterations)
    middles = np.array([figure.iterations[group].mean() for group in groups])
    edges, below, shapes, series = _edges(figure.iterations, groups), np.zeros(len(groups)), [], []
    for label, values, colour in figure.layers:
        heights = np.array([values[group].mean() for group in groups])
        tops = below + heights
        path = "".join(
            f"M{left:.0f} {_up(bottom, 0, figure.top)}V{_up(top, 0, figure.top)}H{right:.0f}V{_up(bottom, 0, figure.top)}Z"
            for (left, right), bottom, top in zip(edges, below, tops)
            if top > bottom
        )
        shapes.append(Shape(path, "part", colour))
        series.append((label, heights, colour))
        below = tops
    return Drawing(
        figure, shapes, _y_ticks(0.0, figure.top), _x_ticks(figure.iterations), [(label, colour) for label, _, colour in series],
        _table(middles, series), _summary(figure.title, middles, series), _data(middles, series),
    )  # fmt: skip


def _heat(figure: Heat) -> Drawing:
    groups = columns(figure.iterations)
    middles = np.array([figure.iterations[group].mean() for group in groups])
    edges, height = _edges(figure.iterations, groups), SIZE / len(figure.rows)
    shares = np.nan_to_num(np.stack([figure.shares[:, group].mean(axis=1) for group in groups], axis=1))
    by_shade: dict[int, list[str]] = {}
    for row in range(len(figure.rows)):
        for (left, right), share in zip(edges, shares[row]):
            if shade := math.ceil(min(share, 1.0) * 20):  # 20 shades: one path each
                top = SIZE - (row + 1) * height
                by_shade.setdefault(shade, []).append(f"M{left:.0f} {top:.0f}H{right:.0f}v{height:.0f}H{left:.0f}Z")
    shapes = [Shape("".join(paths), "cell", figure.colour, (shade / 20) ** 0.7) for shade, paths in sorted(by_shade.items())]
    series = [(label, shares[row], figure.colour) for row, label in enumerate(figure.rows)]
    shown = [row for row in range(len(figure.rows)) if len(figure.rows) <= 9 or row % 2 == 0]
    return Drawing(
        figure, shapes, [((row + 0.5) * 100 / len(figure.rows), figure.rows[row].split()[0]) for row in shown],
        _x_ticks(figure.iterations), [(label, colour) for label, _, colour in series], _table(middles, series),
        _summary(figure.title, middles, series), _data(middles, series),
    )  # fmt: skip


def _dots(figure: Dots) -> Drawing:
    low, high = figure.limits
    shapes, step = [], SIZE / len(figure.rows)
    for place, (_, score, lower, upper, colour) in enumerate(figure.rows):
        y = f"{(place + 0.5) * step:.0f}"
        if lower is not None and upper is not None:
            shapes.append(Shape(f"M{_right(lower, low, high)} {y}H{_right(upper, low, high)}", "whisker", colour))
        shapes.append(Shape(f"M{_right(score, low, high)} {y}h0", "point", colour))
    rows = [[label, number(score), _range(lower, upper)] for label, score, lower, upper, _ in figure.rows]
    words = "; ".join(f"{label}: {score}" + (f" ({span})" if span else "") for label, score, span in rows)
    return Drawing(
        figure, shapes, [], [((tick - low) / (high - low) * 100, number(tick)) for tick in ticks(low, high)], [],
        (["", figure.unit, "95 % interval"], rows), f"{figure.title}. {words}.", labels=[row[0] for row in figure.rows],
    )  # fmt: skip


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def _limits(known: np.ndarray, figure: Curves) -> tuple[float, float]:
    """The figure's limits, widened where values lie beyond, and the data's where it has none, with some room; a share's end at 1."""
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    room = (most - min(least, figure.limits[0] or least)) * 0.08 or abs(most) * 0.1 or 1.0
    low = least - room if figure.limits[0] is None else min(figure.limits[0], least)
    high = most + room if figure.limits[1] is None else max(figure.limits[1], most)
    if figure.unit.startswith("share") and most <= 1:
        high = min(high, 1.0)
    return low, high if high > low else low + 1.0


def _across(iterations: np.ndarray) -> np.ndarray:
    """Where the iterations stand, a column's width apart, in the middle of it."""
    first, last = iterations[0] - 0.5, iterations[-1] + 0.5
    return (iterations - first) / (last - first) * SIZE


def _edges(iterations: np.ndarray, groups: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    first, width = iterations[0] - 0.5, iterations[-1] - iterations[0] + 1.0
    return [((iterations[group[0]] - 0.5 - first) / width * SIZE, (iterations[group[-1]] + 0.5 - first) / width * SIZE) for group in groups]


def _up(value: float, low: float, high: float) -> str:
    return f"{SIZE - (value - low) / (high - low) * SIZE:.0f}"


def _right(value: float, low: float, high: float) -> str:
    return f"{(value - low) / (high - low) * SIZE:.0f}"


def _path(x: np.ndarray, values: np.ndarray, low: float, high: float) -> str:
    """A line through the known values, broken where one is missing; a lone value is a dot."""
    high = high if high > low else low + 1.0
    parts, open_line = [], False
    for place, value in zip(x, values):
        if not math.isfinite(value):
            open_line = False
            continue
        point = f"{place:.0f} {_up(float(value), low, high)}"
        parts.append(f"L{point}" if open_line else f"M{point}h0")
        open_line = True
    return "".join(parts)


def _dots_path(x: np.ndarray, values: np.ndarray, low: float, high: float) -> str:
    return "".join(f"M{place:.0f} {_up(float(value), low, high)}h0" for place, value in zip(x, values) if math.isfinite(value))


def _y_ticks(low: float, high: float) -> list[tuple[float, str]]:
    return [((tick - low) / (high - low) * 100, number(tick)) for tick in ticks(low, high)]


def _x_ticks(iterations: np.ndarray) -> list[tuple[float, str]]:
    first, last = int(iterations[0]), int(iterations[-1])
    whole = sorted({round(tick) for tick in ticks(first, last, 5)} | {first})
    if len(whole) > 1 and whole[1] - whole[0] < (last - first) / 12:
        whole.pop(1)
    return [((tick - first + 0.5) / (last - first + 1) * 100, f"{tick:,}") for tick in whole]


def _table(x: np.ndarray, series: Sequence[tuple[str, np.ndarray, str]]) -> tuple[list[str], list[list[str]]]:
    blocks = np.array_split(np.arange(len(x)), min(len(x), MOST_ROWS))
    rows = []
    for block in blocks:
        span = number(x[block[0]]) if len(block) == 1 else f"{number(x[block[0]])} to {number(x[block[-1]])}"
        rows.append([span, *(_mean(values[block]) for _, values, _ in series)])
    return ["iteration", *(label for label, *_ in series)], rows


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return number(float(known.mean())) if len(known) else "-"


def _summary(title: str, x: np.ndarray, series: Sequence[tuple[str, np.ndarray, str]]) -> str:
    said = []
    for label, values, _ in series:
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            said.append(f"{label}: {number(values[known[0]])} at iteration {number(x[known[0]])}, {number(values[known[-1]])} at {number(x[known[-1]])}")
    return f"{title}. " + "; ".join(said) + "."


def _data(x: np.ndarray, series: Sequence[tuple[str, np.ndarray, str]]) -> dict:
    def short(value: float) -> float | None:
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return {"x": [short(value) for value in x.tolist()], "y": [[short(value) for value in values.tolist()] for _, values, _ in series]}

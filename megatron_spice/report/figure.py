"""What a figure shows, apart from how it is drawn: the page and the PNG files are made from the same.

Colours are names: `challenger` and `reasoner` are the two roles' accents, `s0` to `s6` tell parts or groups of runs apart.
They are Okabe and Ito's, darkened where they must be read as lines, and colour-blind people can tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "challenger": "#0067a3", "reasoner": "#b8500a", "neutral": "#5b6470", "other": "#9aa1a9",
    "s0": "#0072b2", "s1": "#e69f00", "s2": "#009e73", "s3": "#cc79a7", "s4": "#56b4e9", "s5": "#8a6d00", "s6": "#d55e00",
}  # fmt: skip
PARTS = [f"s{number}" for number in range(7)]


@dataclass(frozen=True)
class Line:
    """`values` [iterations] are what was measured, `smooth` [iterations] is drawn boldly, each of `faint` [iterations] behind it."""

    label: str
    values: np.ndarray
    smooth: np.ndarray
    colour: str
    faint: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Curves:
    """Lines over iterations. `limits`: of the vertical axis, None where the data say. `note`: what it means, a sentence."""

    name: str
    title: str
    unit: str
    iterations: np.ndarray
    lines: Sequence[Line]
    limits: tuple[float | None, float | None] = (None, None)
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """Parts of a whole over iterations: a column each, `layers` (label, values [iterations], colour) from below."""

    name: str
    title: str
    unit: str
    iterations: np.ndarray
    layers: Sequence[tuple[str, np.ndarray, str]]
    top: float
    note: str = ""


@dataclass(frozen=True)
class Heat:
    """A histogram that moves: `shares` [rows, iterations] in [0, 1], the darker the larger, rows from below."""

    name: str
    title: str
    unit: str
    iterations: np.ndarray
    rows: Sequence[str]
    shares: np.ndarray
    colour: str
    note: str = ""


@dataclass(frozen=True)
class Dots:
    """Scores with their intervals: `rows` are (label, score, low, high, colour), from above."""

    name: str
    title: str
    unit: str
    rows: Sequence[tuple[str, float, float | None, float | None, str]]
    limits: tuple[float, float]
    note: str = ""


Figure = Curves | Stack | Heat | Dots

"""What tools/crossplay.py found, if it lies in a run's folder `crossplay/` or `crossplay-ITERATION/`: every Reasoner on every
Challenger's tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.report.words import number

NAME = "matrix.json"


@dataclass(frozen=True)
class Matrix:
    """`rows`: (Reasoner, (pass rate, interval) for each of `challengers`), as text."""

    run: str
    challengers: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def read_matrices(folder: Path, run: str) -> list[Matrix]:
    """Those of a run's folder that can be read; one that is of an iteration says so, and they are in this order."""
    named = [(re.fullmatch(r"crossplay(?:-(\d+))?", path.name), path) for path in folder.glob("crossplay*")]
    numbered = sorted((int(name[1] or -1), path) for name, path in named if name)
    found = [_read(path / NAME, run if number < 0 else f"{run}, up to iteration {number}") for number, path in numbered]
    return [matrix for matrix in found if matrix is not None]


def _read(path: Path, run: str) -> Matrix | None:
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        found = {(pair["reasoner"], pair["challenger"]): (pair["pass_rate"], pair["low"], pair["high"]) for pair in pairs}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    reasoners, challengers = (list(dict.fromkeys(pair[place] for pair in found)) for place in (0, 1))
    rows = [(name, [_cell(found.get((name, challenger))) for challenger in challengers]) for name in reasoners]
    return Matrix(run, challengers, rows) if rows else None


def _cell(found: tuple[float | None, float | None, float | None] | None) -> tuple[str, str]:
    if found is None or found[0] is None:
        return "-", ""
    rate, low, high = found
    return number(rate), f"{number(low)} to {number(high)}" if low is not None and high is not None else ""

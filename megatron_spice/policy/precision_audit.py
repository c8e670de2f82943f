"""The audit of precisions as people read it: one line for all layers that are alike.

    decoder.layers.1-27.mlp.linear_fc1              fp8   blockwise e4m3                        81 of 81 forwards in FP8
    decoder.layers.0,28.mlp.linear_fc1              bf16  policy.fp8.first_layers_bf16=1        0 of 6 forwards in FP8
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """What one module runs in. `precision` is what it is set to, "fp8", "bf16" or "fp32"; `detail` its recipe, or why it is
    not in FP8. `forwards` counts its forwards so far (None: not counted), `fp8_forwards` those whose product was in FP8."""

    name: str
    precision: str
    detail: str
    forwards: int | None
    fp8_forwards: int

    @property
    def as_set(self) -> bool:
        """False if it was to run in FP8 and did not, or the other way round."""
        return self.fp8_forwards == (self.forwards if self.precision == "fp8" else 0) or self.forwards is None

    @property
    def counted(self) -> str:
        if self.forwards is None:
            return ""
        if not self.forwards:
            return "not run yet"
        return f"{self.fp8_forwards} of {self.forwards} forwards in FP8" + ("" if self.as_set else "  <- NOT AS SET")


def audit_lines(layers: Sequence[LayerPrecision]) -> list[str]:
    """A table; layers that differ in nothing but their number share a line, and so do the experts of a layer."""
    groups: dict[tuple[str, str, str, str, str], list[int]] = {}
    for layer in layers:
        name = re.sub(r"local_experts\.\d+", "local_experts.*", layer.name)
        before, number, after = _split(name)
        numbers = groups.setdefault((before, after, layer.precision, layer.detail, layer.counted), [])
        if number is not None and number not in numbers:
            numbers.append(number)
    rows = [
        (f"{before}{_ranges(numbers)}{after}", precision, detail, counted)
        for (before, after, precision, detail, counted), numbers in groups.items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def _split(name: str) -> tuple[str, int | None, str]:
    """`decoder.layers.3.mlp` as (`decoder.layers.`, 3, `.mlp`); a name without a layer is its own beginning."""
    found = re.match(r"(.*?\blayers\.)(\d+)(\..*)", name)
    return (found[1], int(found[2]), found[3]) if found else (name, None, "")


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

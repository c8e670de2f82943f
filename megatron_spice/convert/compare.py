"""Two checkpoints of any kinds, tensor by tensor, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_spice.convert.source import Source
from megatron_spice.weights.names import hf_shapes

PIECE = 2**22
"""Numbers compared at a time: their float64 copies are small beside a tensor."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What one tensor, or the whole, differs in."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def differences(one: Source, other: Source) -> Iterator[Difference]:
    """All differences, in the order of the model; nothing if every tensor has the same bits."""
    if one.architecture != other.architecture:
        fields = [name for name in one.architecture.__slots__ if _differs(one, other, name)]
        what = ", ".join(f"{name} {getattr(one.architecture, name)} and {getattr(other.architecture, name)}" for name in fields)
        yield Difference("config.json", what)
    ours, theirs = ({name: entry for entry in source.entries for name in entry.hf} for source in (one, other))
    yield from (Difference(name, f"only in {one.folder}") for name in ours if name not in theirs)
    yield from (Difference(name, f"only in {other.folder}") for name in theirs if name not in ours)
    for entry in one.entries:
        if not all(name in theirs for name in entry.hf):
            continue
        left, right = one.read(entry), other.read(theirs[entry.hf[0]])
        shapes, their_shapes = hf_shapes(entry, one.architecture), hf_shapes(theirs[entry.hf[0]], other.architecture)
        for name in entry.hf:
            if shapes[name] != their_shapes[name]:
                yield Difference(name, f"shapes {shapes[name]} and {their_shapes[name]}")
            elif what := _numbers_differ(left[name], right[name]):
                yield Difference(name, what)


def _differs(one: Source, other: Source, name: str) -> bool:
    return getattr(one.architecture, name) != getattr(other.architecture, name)


def _numbers_differ(one: torch.Tensor, other: torch.Tensor) -> str | None:
    """How two tensors of a shape differ, None if they have the same bits (NaN has them too)."""
    if one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
        return None
    worst, count, nans = 0.0, 0, 0
    for left, right in zip(one.reshape(-1).split(PIECE), other.reshape(-1).split(PIECE)):
        left, right = left.double(), right.double()
        same = (left == right) | (left.isnan() & right.isnan())
        gap = torch.where(same, 0.0, (left - right).abs())
        count += int((~same).sum())
        nans += int(gap.isnan().sum())
        worst = max(worst, gap.nan_to_num(0.0, posinf=float("inf")).max().item())
    kinds = f"{one.dtype} and {other.dtype}, " if one.dtype != other.dtype else ""
    nan = f", {nans} of them NaN on one side" if nans else ""
    values = f"largest |difference| {worst:.3g}, {count} of {one.numel()} numbers{nan}" if count else "the same values in other bits"
    return (kinds + values).replace("torch.", "")

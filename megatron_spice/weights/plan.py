"""Which tensors travel together, and where each lies in the flat piece of memory that a bucket is.

Made once, in plain Python, and equal on all ranks: entries in table order, dealt to their owners (a pipeline stage and, for
experts, an expert rank of it) and cut into buckets of a given size.

A bucket's memory is bytes, because its tensors may be of several types: a weight that is quantised becomes its E4M3 numbers
and, after them, its blocks' factors in float32 (`weights/fp8.py`). Each starts at a multiple of 16 bytes, so that it can be
viewed where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from megatron_spice.config.engine_weights import SCALE_SUFFIX
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.fp8 import DTYPES, WEIGHT_BLOCK, quantise
from megatron_spice.weights.names import Entry, hf_shapes, table
from megatron_spice.weights.stage import Stage

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries that travel together, and the shapes of the tensors they become, in order.

    `stage` is the pipeline stage that has them; `expert_rank` the expert rank that has them there, None if all do.
    """

    stage: int
    expert_rank: int | None
    entries: tuple[Entry, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def owner(self) -> tuple[int, int | None]:
        return self.stage, self.expert_rank

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def plan_buckets(architecture: ModelArchitecture, layout: ParallelLayout, max_elements: int) -> list[Bucket]:
    """Buckets of at most `max_elements` numbers. A single larger tensor is a bucket of its own, and the last may hold an
    eighth more, where that saves one: each costs a request.
    """
    stage = Stage(0, layout, 0, architecture.num_experts)
    owned: dict[tuple[int, int | None], list[Entry]] = {}
    for entry in table(architecture):
        rank, expert_rank = stage.owner(entry)
        shared = entry.expert is None or layout.expert == 1
        owned.setdefault((rank, None if shared else expert_rank), []).append(entry)
    buckets = []
    for owner, entries in owned.items():
        taken: list[Entry] = []
        shapes: dict[str, tuple[int, ...]] = {}
        left = sum(_num_elements(entry, architecture) for entry in entries)
        total = 0
        for entry in entries:
            count = _num_elements(entry, architecture)
            if taken and total + count > max_elements and total + left > max_elements * 9 // 8:
                buckets.append(Bucket(*owner, tuple(taken), shapes))
                taken, shapes, total = [], {}, 0
            taken.append(entry)
            shapes |= hf_shapes(entry, architecture)
            total += count
            left -= count
        buckets.append(Bucket(*owner, tuple(taken), shapes))
    return buckets


def _num_elements(entry: Entry, architecture: ModelArchitecture) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(entry, architecture).values())


def quantised_names(architecture: ModelArchitecture, layers: Collection[int]) -> frozenset[str]:
    """The weights that FP8 products read in these layers: of the attention's and the MLP's or experts' linears."""
    return frozenset(
        name
        for entry in table(architecture)
        if entry.layer in layers and entry.kind in ("qkv", "row", "gated")
        for name in entry.hf
        if name.endswith(".weight")
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes `start` to `end` of a bucket are a tensor of this type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def lay_out(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, quantised: Collection[str] = ()
) -> dict[str, Place]:
    """Where each tensor lies, in order; a `quantised` one is followed by its factors, under its name and `_scale_inv`."""
    places: dict[str, Place] = {}
    end = 0
    for name, shape in shapes.items():
        parts = {name: (dtype, shape)}
        if name in quantised:
            grid = tuple(-(-size // block) for size, block in zip(shape, WEIGHT_BLOCK, strict=True))
            parts = {name: (DTYPES["e4m3"], shape), name + SCALE_SUFFIX: (torch.float32, grid)}
        for part, (own, sizes) in parts.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + math.prod(sizes) * own.itemsize
            places[part] = Place(own, sizes, start, end)
    return places


def size_of(places: Mapping[str, Place]) -> int:
    """Bytes from the first tensor to the end of the last."""
    return max((place.end for place in places.values()), default=0)


def views(flat: torch.Tensor, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """The tensors in a bucket's bytes, uint8 [n], where they lie."""
    return {name: flat[at.start : at.end].view(at.dtype).view(at.shape) for name, at in places.items()}


def put(into: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    """Writes a tensor into its view, or, where there is a place for factors, its FP8 numbers and these."""
    factors = into.get(name + SCALE_SUFFIX)
    if factors is None:
        into[name].view(tensor.shape).copy_(tensor)
        return
    values, scale_inv = quantise(tensor.reshape(into[name].shape), WEIGHT_BLOCK)
    into[name].copy_(values)
    factors.copy_(scale_inv)

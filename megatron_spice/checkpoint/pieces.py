"""What one rank saves of a policy, free of the layout that holds it.

The distributed optimiser cuts a rank's flat buffer of parameters into equal ranges, one for each data-parallel rank, wherever
that falls inside a tensor. torch_dist knows blocks of a tensor only. A range of a tensor's numbers in order is a few blocks: the
end of a row, whole rows, the beginning of a row. So every rank saves the numbers that it owns, weights too, and nothing has
to be gathered: ranks write at once, as much each, and none needs memory for another's part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of the tensor that a key stands for.

    Args:
        key: the tensor's name in the checkpoint.
        whole: the tensor's shape.
        offsets: where the block begins in it, a number for each dimension.
        sizes: the block's shape, with as many dimensions.
        tensor: its numbers in order, flat and contiguous.
    """

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank has to save.

    Args:
        pieces: blocks of tensors; all ranks' together are whole, and no two overlap.
        objects: what is not tensors and only this rank has, by key, as `torch.save` writes it.
        common: what is not tensors and all ranks have; the first rank's is saved.
    """

    pieces: list[Piece]
    objects: dict[str, bytes]
    common: dict[str, Any]


def blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the blocks that make up the numbers `start` to `stop` (exclusive) of a tensor in row-major order,
    one after the other; at most two less one for each dimension."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in blocks(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)

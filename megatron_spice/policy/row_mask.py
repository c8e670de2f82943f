"""Who attends to whom in a packed row, and what attention kernels make of it.

A row is `[prompt | completion | completion ... | prompt | ...]`; three numbers a token say who it is (`rows.py`): its
prompt's number, its completion's number or -1 in a prompt, its place in the row. Token q sees token k if and only if

    prompt_q = prompt_k   and   leaf_k in (-1, leaf_q)   and   place_k <= place_q

Written out as a matrix that is almost empty, so kernels get it in pieces. All layers of a model ask about the same row, and
a recomputed forward asks again, so the pieces are kept for the rows seen last.

Shapes: q query tokens, k key tokens, m keys that a tile sees.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

KEPT_ROWS = 64
"""More than the rows a rank has in flight in its pipeline stage."""

Value = TypeVar("Value")
_CACHES: weakref.WeakSet[RowCache[Any]] = weakref.WeakSet()


def dense_mask(codes_q3: torch.Tensor, codes_k3: torch.Tensor) -> torch.Tensor:
    """bool [q, k]: the query token (first axis) sees the key token (second axis)."""
    prompt_q, leaf_q, place_q = codes_q3[:, None].unbind(-1)
    prompt_k, leaf_k, place_k = codes_k3[None].unbind(-1)
    return (prompt_q == prompt_k) & ((leaf_k == -1) | (leaf_k == leaf_q)) & (place_k <= place_q)


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries start:stop and the keys that any of them sees: first the `common` ones, which all of them see, then those
    that `mask` [stop - start, m - common] tells apart. `keys` picks the m keys: a slice where they stand together."""

    start: int
    stop: int
    keys: slice | torch.Tensor
    common: int
    mask: torch.Tensor


def tiles(codes_q3: torch.Tensor, codes_k3: torch.Tensor, rows: int) -> tuple[Tile, ...]:
    """Cuts the queries into tiles of at most `rows`, together seeing little that is masked: a prompt's tokens apart from
    its completions', completions of one prompt together. Cached."""
    return _TILES.get(codes_q3, codes_k3, lambda: _make_tiles(codes_q3, codes_k3, rows), rows)


def _make_tiles(codes_q3: torch.Tensor, codes_k3: torch.Tensor, rows: int) -> tuple[Tile, ...]:
    found = []
    for start, stop in _cut(codes_q3, rows):
        visible = dense_mask(codes_q3[start:stop], codes_k3)
        common = visible.all(0)
        order = torch.cat([common.nonzero()[:, 0], (visible.any(0) & ~common).nonzero()[:, 0]])
        num_common = int(common.sum())
        first = int(order[0])
        together = torch.equal(order, torch.arange(first, first + len(order), device=order.device))
        keys = slice(first, first + len(order)) if together else order
        found.append(Tile(start, stop, keys, num_common, visible[:, order[num_common:]].contiguous()))
    return tuple(found)


def _cut(codes_q3: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Query ranges: runs of one prompt's or one completion's tokens, long ones cut, short ones joined."""
    start = size = 0
    held: tuple[int, bool] | None = None  # prompt and whether it is its completions; None: runs of several
    for owner, length in _runs(codes_q3):
        if size and (size + length > rows or (owner != held and size + length > rows // 2)):
            yield start, start + size
            start, size = start + size, 0
        held = owner if not size or owner == held else None
        size += length
        pieces = -(-size // rows)
        for piece in range(pieces, 1, -1):
            step = -(-size // piece)
            yield start, start + step
            start, size = start + step, size - step
    if size:
        yield start, start + size


def _runs(codes_q3: torch.Tensor) -> Iterator[tuple[tuple[int, bool], int]]:
    """Runs of tokens as ((prompt, is one of several completions), length); a prompt and its only completion are one run, and
    so is padding."""
    names = [(max(prompt, -1), leaf) for prompt, leaf in codes_q3[:, :2].tolist()]
    completions = Counter(prompt for prompt, leaf in set(names) if leaf >= 0)
    names = [(prompt, leaf if completions[prompt] > 1 else -1) for prompt, leaf in names]
    for (prompt, leaf), run in itertools.groupby(names):
        yield (prompt, leaf >= 0), sum(1 for _ in run)


class RowCache(Generic[Value]):
    """What was made of the rows seen last.

    Rows are told apart by the memory their codes lie in: recomputation hands in other tensor objects on the same memory.
    Holding the codes keeps the memory from being given to another row. Codes must not be written to once they are used.
    """

    def __init__(self, size: int = KEPT_ROWS) -> None:
        self.size = size
        self.kept: OrderedDict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, Value]] = OrderedDict()
        _CACHES.add(self)

    def get(self, codes_q3: torch.Tensor, codes_k3: torch.Tensor, make: Callable[[], Value], *rest: Any) -> Value:
        """The value kept for these codes and `rest`, else what `make` returns."""
        key = (*_memory(codes_q3), *_memory(codes_k3), *rest)
        if key not in self.kept:
            self.kept[key] = (codes_q3, codes_k3, make())
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key][2]


def forget_rows() -> None:
    """Empties all caches: between updates their rows' memory is for others."""
    for cache in _CACHES:
        cache.kept.clear()


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


_TILES: RowCache[tuple[Tile, ...]] = RowCache()

"""A range of a tensor's numbers is a few blocks of it, and nothing else is."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.checkpoint.pieces import Piece, blocks
from megatron_spice.checkpoint.snapshot import Snapshot


@st.composite
def ranges(draw) -> tuple[list[int], int, int]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    start, stop = sorted(draw(st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2)))
    return shape, start, stop


@given(ranges())
def test_blocks_are_the_range_in_order(case):
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = list(blocks(shape, start, stop))
    assert len(found) <= 2 * len(shape) - 1
    inside = [numbers[tuple(slice(at, at + size) for at, size in zip(*block))].flatten() for block in found]
    assert torch.cat([torch.empty(0, dtype=torch.long), *inside]).tolist() == list(range(start, stop))


def test_a_snapshot_is_what_was_there_and_shares_what_is_shared():
    first, second = torch.arange(5.0), torch.arange(7, dtype=torch.bfloat16)
    pieces = [Piece(key, (5,), (0,), (5,), first) for key in ("weight", "master")] + [Piece("other", (7,), (0,), (7,), second)]
    snapshot = Snapshot()
    snapshot.reserve(pieces)
    reserved = snapshot.num_bytes
    taken, is_copied = snapshot.take(pieces)
    memory = taken[0].tensor.data_ptr()
    first.add_(1)
    is_copied()
    assert [piece.tensor.tolist() for piece in taken] == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 2, 3, 4, 5, 6]]
    assert taken[0].tensor.data_ptr() == taken[1].tensor.data_ptr() != first.data_ptr()
    again, _ = snapshot.take(pieces)
    assert again[0].tensor.data_ptr() == memory and snapshot.num_bytes == reserved, "host memory is taken once"
    assert again[0].tensor.tolist() == [1, 2, 3, 4, 5]

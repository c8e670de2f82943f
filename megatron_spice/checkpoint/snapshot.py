"""A copy in host memory of what a rank saves, so that training goes on while it is written.

The memory is taken once and kept: a fresh page costs the kernel twice what copying into it does, and page-locked
memory, which an accelerator copies into by itself, costs far more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_spice.checkpoint.pieces import Piece
from megatron_spice.cluster.host_memory import host_memory

ALIGNMENT = 64  # bytes; any dtype may begin there


class Snapshot:
    """One copy at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Host memory that it keeps."""
        return self._memory.numel()

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Takes the memory for pieces such as these before it is needed."""
        self._room(pieces)
        self._memory.zero_()  # the pages too

    def take(self, pieces: Sequence[Piece]) -> tuple[list[Piece], Callable[[], None]]:
        """The pieces over a copy of their numbers, and what to wait with until that is complete; the originals may change at once,
        on an accelerator by what is queued on the current stream after this.

        Numbers that several keys share (in float32 a weight is its own master) are copied once.
        """
        places, on_device = self._room(pieces), any(piece.tensor.is_cuda for piece in pieces)
        copies: dict[int, torch.Tensor] = {}
        taken = []
        for piece in pieces:
            place, tensor = places[_identity(piece.tensor)], piece.tensor
            if place not in copies:
                copies[place] = self._memory[place : place + tensor.nbytes].view(tensor.dtype)
                copies[place].copy_(tensor, non_blocking=True)
            taken.append(replace(piece, tensor=copies[place]))
        if not on_device:
            return taken, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return taken, copied.synchronize

    def _room(self, pieces: Sequence[Piece]) -> dict[tuple[int, int], int]:
        """Where the numbers of each of the pieces' tensors begin in the memory, of which there is enough then."""
        places: dict[tuple[int, int], int] = {}
        total = 0
        for piece in pieces:
            if _identity(piece.tensor) not in places:
                places[_identity(piece.tensor)] = total
                total += -(-piece.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if total > self._memory.numel():
            self._memory = self._memory[:0].clone()  # the old memory goes first
            self._memory = host_memory(total, pinned=any(piece.tensor.is_cuda for piece in pieces))
        return places


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes

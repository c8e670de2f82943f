"""Where weights go to: one interface over the kinds of folders, written in parts that know nothing of each other.

A part is a run of entries of the name table whose bytes have places of their own: a file, or stretches of files that other
parts fill too. So parts can be written in any order, by any number of processes, and again after an interruption. What a
part leaves to know (where its tensors lie, say) is its record, kept as JSON until the last part is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_spice.convert.source import Source
from megatron_spice.weights.names import Entry

Advance = Callable[[int], None]
"""Told of bytes as they are written."""

SMALLEST_PART, LARGEST_PART = 2**26, 2**31
PARTS = 64
"""About so many parts a model has, between these sizes: enough for all processes to end together, few enough that each can be
brought to the disk for itself. It depends on nothing but the model, so that a run can be taken up with more processes."""
_WRITE = 2**24
"""Bytes written between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of entries, and the bytes they become."""

    number: int
    entries: Sequence[Entry]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """A part that was written: its record, and the descriptors of its files, which are to be synced and closed."""

    record: Any
    descriptors: Sequence[int]


class Target(Protocol):
    """A checkpoint to be written into an empty folder.

    Attributes:
        parts: all of it, but what `finish` adds.
    """

    parts: list[Part]

    def prepare(self, folder: Path) -> None:
        """Makes what all parts share. Called once, before the first part."""

    def open(self, folder: Path) -> None:
        """Called in each run after `prepare`, before the processes part."""

    def write(self, part: Part, folder: Path, source: Source, advance: Advance) -> Written:
        """Writes a part; that it reaches the disk is for the caller to see to."""

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        """Writes what says how the parts belong together; `records` are in the order of the parts."""


def make_parts(sized: Sequence[tuple[Entry, int]], together: Callable[[Entry], Any] = lambda entry: None) -> list[Part]:
    """Entries with their bytes, cut into parts; where `together` changes, a part ends."""
    size = min(max(sum(count for _, count in sized) // PARTS, SMALLEST_PART), LARGEST_PART)
    return [Part(number, entries, count) for number, (entries, count) in enumerate(_runs(sized, size, together))]


def _runs(
    sized: Sequence[tuple[Entry, int]], size: int, together: Callable[[Entry], Any]
) -> Iterator[tuple[tuple[Entry, ...], int]]:
    taken: list[Entry] = []
    total = 0
    for entry, count in sized:
        if taken and (total + count > size or together(entry) != together(taken[-1])):
            yield tuple(taken), total
            taken, total = [], 0
        taken.append(entry)
        total += count
    if taken:
        yield tuple(taken), total


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in order; a copy only where it does not lie so."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B")


def write_at(descriptor: int, tensor: torch.Tensor, offset: int, advance: Advance) -> None:
    """Puts a tensor's bytes at an offset of a file."""
    left = raw_bytes(tensor)
    while left:
        count = os.pwrite(descriptor, left[:_WRITE], offset)
        left, offset = left[count:], offset + count
        advance(count)

"""The passage table: one row of 28 bytes a passage, saying where its tokens lie and what their checksum is.

Documents stay whole in the shards, so that any Megatron tool can read them; how they are cut is only in this table. A row
names the place in the shard's .bin, not in the document, so reading a passage needs no .idx: a shard costs one map.

The checksum (XXH3, seeded with the place) lets every read be verified for a tenth of a microsecond a kilobyte. A passage
that was read is the one that was written: a flipped bit in the tokens, or in what the row says of them, cannot go unseen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import xxhash

from megatron_spice.corpus.table_file import TableWriter, open_table

PASSAGE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row of the shard table
        ("document", "<u4"),  # number of the document in its shard
        ("start", "<u8"),  # first token, in the shard's .bin
        ("length", "<u4"),  # tokens
        ("source", "<u4"),  # place of the source label in the manifest
        ("checksum", "<u4"),  # passage_checksum of the tokens
    ]
)


class PassageWriter(TableWriter):
    """Writes a passage table; `add` takes rows of `PASSAGE_DTYPE`."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, PASSAGE_DTYPE)


def open_passages(path: str | os.PathLike[str]) -> np.ndarray:
    """The table as a read-only memory map, [passages] of `PASSAGE_DTYPE`; ValueError when it is none or cut short."""
    return open_table(path, PASSAGE_DTYPE, "passage table")


def passage_checksum(data: bytes | memoryview | np.ndarray, start: int) -> int:
    """Checksum of a passage's tokens, as their bytes stand in the .bin, beginning with token `start` of it."""
    return xxhash.xxh3_64_intdigest(data, start) & 0xFFFFFFFF


def passage_checksums(ids: np.ndarray, offsets: Sequence[int], lengths: Sequence[int], start: int) -> list[int]:
    """Checksums of passages of `ids` ([tokens], of the shard's dtype), which are written from token `start` of the .bin on.

    Args:
        offsets, lengths: of the passages, in tokens of `ids`.
    """
    data, size = memoryview(np.ascontiguousarray(ids).view(np.uint8)), ids.dtype.itemsize
    digest = xxhash.xxh3_64_intdigest
    return [
        digest(data[offset * size : (offset + length) * size], start + offset) & 0xFFFFFFFF
        for offset, length in zip(offsets, lengths)
    ]

"""The shard table: one row of 80 bytes a shard, so that a corpus of 100,000 shards opens without touching one of them.

A shard's files are named by folder (a place in the manifest's list, relative to the corpus folder; "" is the folder
itself) and number. Merged corpora share nothing but tables: their shards stay in the folders where they were made.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from megatron_spice.corpus.table_file import open_table, write_table

SHARD_DTYPE = np.dtype(
    [
        ("folder", "<u4"),  # place in the manifest's folders
        ("number", "<u4"),  # of the file names
        ("documents", "<u8"),
        ("tokens", "<u8"),
        ("bin_sha256", "V32"),
        ("idx_sha256", "V32"),
    ]
)


class ShardTotals(NamedTuple):
    """What a finished shard holds, and the SHA-256 digests of its two files."""

    documents: int
    tokens: int
    bin_sha256: bytes
    idx_sha256: bytes

    def row(self, number: int, folder: int = 0) -> np.ndarray:
        """Its row of the table, [1] of `SHARD_DTYPE`."""
        return np.array([(folder, number, *self)], dtype=SHARD_DTYPE)


def shard_prefix(folder: str | os.PathLike[str], number: int) -> str:
    """A shard's files without .bin and .idx."""
    return os.path.join(folder, f"shard_{number:05d}")


def shard_bytes(documents: int, tokens: int, dtype: np.dtype) -> dict[str, int]:
    """Size of a shard's files by suffix: header, then a length, a place and a mark a document and one mark more."""
    return {".bin": tokens * dtype.itemsize, ".idx": 34 + 20 * documents + 8}


def write_shards(path: str | os.PathLike[str], rows: np.ndarray) -> dict:
    """Write the table of `rows` ([shards] of `SHARD_DTYPE`); its size and checksum as the manifest keeps them."""
    assert rows.dtype == SHARD_DTYPE
    return write_table(path, rows)


def open_shards(path: str | os.PathLike[str]) -> np.ndarray:
    """The table as a read-only memory map, [shards] of `SHARD_DTYPE`; ValueError when it is none or cut short."""
    return open_table(path, SHARD_DTYPE, "shard table")

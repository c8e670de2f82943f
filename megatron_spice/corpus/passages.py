"""The passage table: one row of 20 bytes a passage, saying where its tokens lie, in a memory-mapped .npy.

Documents stay whole in the shards, so that any Megatron tool can read them; how they are cut is only in this table. It
is written as the passages come: the .npy header, which says how many rows there are, has room left for and is filled in
at the end.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

PASSAGE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # number of the shard
        ("document", "<u4"),  # number of the document in its shard
        ("offset", "<u4"),  # first token in the document
        ("length", "<u4"),  # tokens
        ("source", "<u4"),  # place of the source label in the manifest
    ]
)
_HEADER_BYTES = 512


class PassageWriter:
    """Writes a passage table row by row, in memory that does not grow."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._file.write(b"\0" * _HEADER_BYTES)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        """Append rows in the order of `PASSAGE_DTYPE`."""
        self._file.write(np.array(rows, dtype=PASSAGE_DTYPE).tobytes())
        self._rows += len(rows)

    def close(self) -> dict:
        """Finish the file, on disk; its size and checksum as the manifest keeps them."""
        self._file.seek(0)
        self._file.write(_npy_header(self._rows))
        self._file.flush()
        self._file.seek(0)
        digest = hashlib.sha256()
        while block := self._file.read(1 << 20):
            digest.update(block)
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": _HEADER_BYTES + self._rows * PASSAGE_DTYPE.itemsize, "sha256": digest.hexdigest()}

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.close()


def open_passages(path: str | os.PathLike[str]) -> np.ndarray:
    """The table as a read-only memory map, [passages] of `PASSAGE_DTYPE`.

    Raises:
        ValueError: it is not a passage table, or is cut short.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        if Path(path).stat().st_size == _HEADER_BYTES:  # no rows: nothing to map
            return np.empty(0, PASSAGE_DTYPE)
        raise ValueError(f"{path} is not a whole passage table: {error}") from error
    if table.dtype != PASSAGE_DTYPE or table.ndim != 1:
        raise ValueError(f"{path} is not a passage table: {table.dtype}, {table.ndim} dimensions")
    return np.asarray(table)


def _npy_header(rows: int) -> bytes:
    """Version 1.0 of the .npy header, padded with spaces as the format allows."""
    text = repr({"descr": PASSAGE_DTYPE.descr, "fortran_order": False, "shape": (rows,)}).encode("latin-1")
    prefix = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.ljust(_HEADER_BYTES - 11) + b"\n"

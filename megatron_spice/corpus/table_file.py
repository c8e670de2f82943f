"""Tables as .npy files: written row by row in memory that does not grow, read as memory maps by any numpy.

The .npy header says how many rows there are, which is known at the end only: room is left for it and filled in then. All
tables of a corpus folder are made here, so they have one header size, and the size of a file follows from its rows.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

HEADER_BYTES = 512


class TableWriter:
    """Writes a table of `dtype` row by row."""

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype):
        self._dtype = dtype
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._file.write(b"\0" * HEADER_BYTES)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: np.ndarray) -> None:
        """Append rows, [rows] of the table's dtype."""
        assert rows.dtype == self._dtype, f"rows of {rows.dtype} in a table of {self._dtype}"
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def put(self, place: int, rows: np.ndarray) -> None:
        """Write rows to a place of their own, in any order; in the end every place must have been written once."""
        self._file.seek(HEADER_BYTES + place * self._dtype.itemsize)
        self.add(rows)

    def close(self) -> dict:
        """Finish the file, on disk; its size and checksum as the manifest keeps them."""
        self._file.seek(0)
        self._file.write(_header(self._dtype, self._rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.sha256()
        while block := self._file.read(1 << 20):
            digest.update(block)
        self._file.close()
        return {"bytes": HEADER_BYTES + self._rows * self._dtype.itemsize, "sha256": digest.hexdigest()}

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.close()


def write_table(path: str | os.PathLike[str], rows: np.ndarray) -> dict:
    """Write a whole table that is in memory; its size and checksum as the manifest keeps them."""
    writer = TableWriter(path, rows.dtype)
    try:
        writer.add(rows)
        return writer.close()
    finally:
        writer.abandon()


def open_table(path: str | os.PathLike[str], dtype: np.dtype, kind: str) -> np.ndarray:
    """The table as a read-only memory map, [rows] of `dtype`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no `kind` ("passage table", for the message), or is cut short.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, SyntaxError) as error:
        if Path(path).stat().st_size == HEADER_BYTES:  # no rows: nothing to map
            return np.empty(0, dtype)
        raise ValueError(f"{path} is not a whole {kind}: {error}") from error
    if table.dtype != dtype or table.ndim != 1:
        raise ValueError(f"{path} is not a {kind}: {table.dtype}, {table.ndim} dimensions")
    return np.asarray(table)


def _header(dtype: np.dtype, rows: int) -> bytes:
    """Version 1.0 of the .npy header, padded with spaces as the format allows."""
    descr = dtype.descr if dtype.names else dtype.str
    text = repr({"descr": descr, "fortran_order": False, "shape": (rows,)}).encode("latin-1")
    prefix = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.ljust(HEADER_BYTES - 11) + b"\n"

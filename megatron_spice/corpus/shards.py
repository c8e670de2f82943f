"""Megatron's `.bin/.idx` files: token ids of many documents, end to end, and where each begins.

`.bin` is nothing but ids. `.idx` is little-endian: 9 bytes magic, version (u64), code of the ids' dtype (u8), number of
sequences and of document marks (u64 each), the sequences' lengths (i32 each) and their byte positions in `.bin` (i64
each), and the document marks (i64 each): document d is made of the sequences marks[d] to marks[d+1]. Ours has one
sequence a document; files of other tools may have more, and are read as well. (Layout:
megatron/core/datasets/indexed_dataset.py, which the tests compare both ways. Not imported here: reading a corpus should
not need Megatron.)
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_spice.corpus.shard_table import ShardTotals

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_LONGEST = 2**31 - 1  # sequence lengths are int32


def ids_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron takes for ids of a vocabulary of this size."""
    return np.dtype("uint16" if vocab_size < 65500 else "int32")


class ShardWriter:
    """Writes `prefix`.bin as documents come and `prefix`.idx on `close`; memory grows by 4 bytes a document.

    Attributes:
        tokens: how many are written, which is where the next document starts.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype):
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed by close)
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, ids: np.ndarray) -> int:
        """Append one document (integer [length]); its number in this shard. Raises what `add_many` does."""
        return self.add_many(ids, [len(ids)])

    def add_many(self, ids: np.ndarray, lengths: Sequence[int] | np.ndarray) -> int:
        """Append documents; the first one's number in this shard.

        Args:
            ids: of all the documents, one after the other (integer [sum of lengths]).
            lengths: of each document.

        Raises:
            ValueError: an id does not fit the dtype, or a document is longer than the format can say.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, dtype=np.int64)
        assert len(ids) == lengths.sum(), f"{len(ids)} ids for lengths that sum to {lengths.sum()}"
        limits = np.iinfo(self._dtype)
        if ids.dtype != self._dtype and len(ids) and (ids.min() < limits.min or ids.max() > limits.max):
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {self._dtype}")
        if len(lengths) and lengths.max() > _LONGEST:
            raise ValueError(f"a document of {lengths.max()} tokens; the .idx format holds at most {_LONGEST}")
        first = len(self._lengths)
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(ids)
        return first

    def close(self) -> ShardTotals:
        """Finish both files, on disk; what they hold."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        positions = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=positions[1:])
        positions *= self._dtype.itemsize
        marks = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _HEADER.pack(_MAGIC, 1, _CODES[self._dtype.name], len(lengths), len(marks))
        index = header + lengths.tobytes() + positions.tobytes() + marks.tobytes()
        with open(f"{self._prefix}.idx", "wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        self.abandon(sync=True)
        return ShardTotals(len(lengths), self.tokens, self._digest.digest(), hashlib.sha256(index).digest())

    def abandon(self, sync: bool = False) -> None:
        """Close the file without writing an index."""
        if not self._bin.closed:
            self._bin.flush()
            if sync:
                os.fsync(self._bin.fileno())
            self._bin.close()


class ShardReader:
    """A memory-mapped shard; `document(d)` is a view into the map, nothing is copied.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the files are not what the format says, or are cut short.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        index = _map(Path(f"{prefix}.idx"))
        if len(index) < _HEADER.size:
            raise ValueError(f"{prefix}.idx is cut short: {len(index)} bytes")
        magic, version, code, sequences, marks = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(f"{prefix}.idx is no index of Megatron (magic {magic!r}, version {version}, dtype {code})")
        expected = _HEADER.size + sequences * 12 + marks * 8
        if len(index) < expected:
            raise ValueError(f"{prefix}.idx is cut short: {len(index)} bytes of at least {expected}")
        self.dtype = np.dtype(_DTYPES[code])
        lengths_end = _HEADER.size + sequences * 4
        positions_end = lengths_end + sequences * 8
        self._lengths = index[_HEADER.size : lengths_end].view(np.int32)
        self._positions = index[lengths_end:positions_end].view(np.int64)
        self._marks = index[positions_end : positions_end + marks * 8].view(np.int64)
        data = _map(Path(f"{prefix}.bin"))
        needed = int(self._positions[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if sequences else 0
        if len(data) < needed:
            raise ValueError(f"{prefix}.bin is cut short: {len(data)} bytes of {needed}")
        self._ids = data[:needed].view(self.dtype)

    def __len__(self) -> int:
        """Number of documents."""
        return max(len(self._marks) - 1, 0)

    def document(self, number: int) -> np.ndarray:
        """Ids of a document, [length] of the shard's dtype, read-only."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of a shard of {len(self)}")
        first, end = int(self._marks[number]), int(self._marks[number + 1])
        if first == end:
            return self._ids[:0]
        start = int(self._positions[first]) // self.dtype.itemsize
        stop = int(self._positions[end - 1]) // self.dtype.itemsize + int(self._lengths[end - 1])
        return self._ids[start:stop]


def _map(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only map. A plain array over it: slicing a numpy.memmap is several times slower."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

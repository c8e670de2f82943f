"""Append-only files of one JSON object a line, each with an `iteration`, that a resumed run can take up again.

A line is written and flushed whole, but a killed process may leave half of one. On resume everything after the
iteration resumed from is cut off, torn line included: iterations only grow along the file, so what goes is its tail,
and one truncation, which cannot stop half-way, is enough.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_spice.config.errors import storing


class JsonLines:
    """Writes `path`, keeping what it has up to iteration `keep_through`.

    Args:
        look: called before the file is changed; raises where it is another run's by now.
    """

    def __init__(self, path: Path, keep_through: int, look: Callable[[], None] = lambda: None):
        self._look = look
        look()
        if path.is_file():
            os.truncate(path, _length_through(path, keep_through))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, records: list[dict]) -> None:
        """Append the records; numbers that JSON lacks (NaN, infinity) become null.

        Raises:
            StorageError: the file system does not take them, none of them then, or the file is not at its path any more.
        """
        text = "".join(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        with storing(self._path):
            self._look()
            found, mine = os.stat(self._path), os.fstat(self._file.fileno())
            if (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
            # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
            self._append(text.encode(errors="backslashreplace"))

    def _append(self, lines: bytes) -> None:
        left = memoryview(lines)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - (len(lines) - len(left)))
            raise

    def close(self) -> None:
        """Close the file, on disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read_json_lines(path: Path) -> list[dict]:
    """The records of a file, without a torn last line.

    Raises:
        ValueError: a line before the last is broken.
    """
    return list(each_json_line(path))


def each_json_line(path: Path) -> Iterator[dict]:
    """The same, one record at a time: a run's episodes may be gigabytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def _length_through(path: Path, iteration: int) -> int:
    """Bytes of the whole lines whose iteration is at most this, up to the first that is not."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                if json.loads(line)["iteration"] > iteration:
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
    return length


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

"""Append-only files of one JSON object a line, each with an `iteration`, that a resumed run can take up again.

A line is written and flushed whole, but a killed process may leave half of one. On resume everything after the
iteration resumed from is cut off, torn line included: iterations only grow along the file, so what goes is its tail,
and one truncation, which cannot stop half-way, is enough.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


class JsonLines:
    """Writes `path`, keeping what it has up to iteration `keep_through`."""

    def __init__(self, path: Path, keep_through: int):
        if path.is_file():
            os.truncate(path, _length_through(path, keep_through))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, records: list[dict]) -> None:
        """Append the records; numbers that JSON lacks (NaN, infinity) become null."""
        text = "".join(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write(text)
        self._file.flush()

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
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return records


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

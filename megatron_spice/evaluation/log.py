"""The log of one task: a header line that says what was asked, then a line for each question with all its answers.

Lines are written when a question is through, so whatever ends the program loses only questions that were being answered.
A header that differs means other answers: it is refused rather than mixed. A last line that was cut short is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class TaskLog:
    """The file of a task, opened for more. `done`: the record of each finished item, by its id.

    Raises:
        ValueError: the file was begun with another header, which the message compares; it is damaged, or in use.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = self._read(dict(header))
        except OSError:
            self._file.close()
            raise ValueError(f"{path} is being written by another evaluation") from None
        except ValueError:
            self._file.close()
            raise
        self._file.truncate(size)
        if size == 0:
            self._write(dict(header))

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one item's record, which has its `id`."""
        self._write(record)
        self.done[record["id"]] = dict(record)

    def close(self) -> None:
        """Brings everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        self._file.flush()

    def _read(self, header: dict[str, Any]) -> int:
        """Fills `done`; returns how many bytes are whole lines."""
        size = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    if number > 1:
                        self.done[record["id"]] = record
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{self.path}:{number} is not a line of such a log; remove the file or give another --output") from None
                if number == 1 and record != json.loads(json.dumps(header)):
                    raise ValueError(f"{self.path} was begun otherwise ({_difference(record, header)}): give another --output, or remove it")
                size += len(line)
        return size


def _difference(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "its first line is no header"
    new = json.loads(json.dumps(new))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r:.80}, is {new.get(key)!r:.80}" for key in keys)

"""The log of one task: a header line that says what was asked, then a line for each question with all its answers.

Lines are written when a question is through, so whatever ends the program loses only questions that were being answered. Of
several lines with one id the last one counts: a judge's opinion is added by writing the question again. A header that differs
means other answers, and a question that differs is another one: both are refused rather than mixed. Which questions there are,
and whether a judge is asked, does not decide an answer, so a log goes on with more of them or with a judge. A last line that
was cut short is dropped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks say; there it is up to the user that no two evaluations write one log."""
FORMAT = 2
"""1, which no header names, had the judge and a hash of all questions in its header."""
_ONLY_IN_FORMAT_1 = ("judge", "questions")


class TaskLog:
    """The file of a task, opened for more. `done`: the record of each finished item, by its id.

    Raises:
        ValueError: the file was begun with another header, which the message compares; it is damaged, or in use.
        OSError: the file system does not let it be read or written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "ab")
        try:
            self._lock()
            size = self._read(dict(header))
        except (OSError, ValueError):
            self._file.close()
            raise
        self._file.truncate(size)
        if size == 0:
            self._write(dict(header))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another evaluation") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one item's record, which has its `id`."""
        self._write(record)
        self.done[record["id"]] = dict(record)

    def expect(self, questions: Iterable[Mapping[str, Any]]) -> None:
        """Checks that what was answered are these questions (`Item.as_json`), as far as they are there.

        Raises:
            ValueError: one of the same id was asked otherwise, or had another right answer.
        """
        for asked in questions:
            record = self.done.get(asked["id"])
            if record is not None and (problem := _difference({k: v for k, v in record.items() if k != "answers"}, dict(asked))):
                raise ValueError(f"{self.path} has another question {asked['id']!r} ({problem}): give another --output, or remove it")

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
                if number == 1 and (problem := _begun_otherwise(record, header)):
                    raise ValueError(f"{self.path} was begun otherwise ({problem}): give another --output, or remove it")
                size += len(line)
        return size


def _begun_otherwise(old: Any, new: dict[str, Any]) -> str:
    """Why a log with one header is not one with another, "" if it is. A value of None in the new one is not known, and any will do."""
    if not isinstance(old, dict):
        return "its first line is no header"
    if old.get("format", 1) == 1 and "format" in new:
        old = {key: value for key, value in old.items() if key not in _ONLY_IN_FORMAT_1} | {"format": new["format"]}
    return _difference({key: value for key, value in old.items() if new.get(key, "") is not None}, {k: v for k, v in new.items() if v is not None})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    new = json.loads(json.dumps(new))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} {_shown(old, key, 'was')}, {_shown(new, key, 'is')}" for key in keys)


def _shown(values: dict[str, Any], key: str, verb: str) -> str:
    return f"{verb} {values[key]!r:.80}" if key in values else f"{verb} not said"

"""A run's files as they grow, for whoever looks on from outside: nothing here writes, locks or waits.

`JsonLines` may cut the tail off (a resumed run goes back to its checkpoint) and write it anew, so a follower cannot trust
its own offset: what it reads there is then the middle of another line, or an iteration that it has had already.
"""

from __future__ import annotations

import json
from pathlib import Path

TAIL_BYTES = 1 << 20


class Follower:
    """The records of a metrics.jsonl; `read` gives all so far and reads only what is new."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0
        self._records: list[dict] = []

    def read(self) -> list[dict]:
        """Whole records, iterations ascending; [] while there is no file."""
        if not self._read_on():
            self._offset, self._records = 0, []
            self._read_on()
        return self._records

    def _read_on(self) -> bool:
        """Whether what stands behind the offset goes on from what was read before it."""
        if not self.path.is_file() or self.path.stat().st_size < self._offset:
            return self._offset == 0
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                try:
                    record = json.loads(line)
                    iteration = record["iteration"]
                except (ValueError, KeyError, TypeError):
                    if self._offset:
                        return False
                    raise ValueError(f"{self.path} is not the metrics of a run: {line[:80]!r}") from None
                while self._records and self._records[-1]["iteration"] >= iteration:
                    self._records.pop()
                self._records.append(record)
                self._offset += len(line)
        return True


def last_record(path: Path) -> dict | None:
    """The last whole record of a JSON lines file, None without one in its last MiB."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    if start:
        lines = lines[1:]
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None

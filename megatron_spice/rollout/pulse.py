"""Whether a server that was given work is doing any.

A server can hang in ways that no connection shows: its scheduler is stopped or waits for a lock, while its HTTP process
answers as ever. But a scheduler that works uses processor time, on a CPU for the arithmetic and on an accelerator for
polling. (One that spins on a hung kernel is for SGLang's own watchdog, which ends it.)

Time is counted in looks, each of a second at most: a machine that was suspended, trainer and all, owes nothing.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

LOOK = 1.0  # seconds


class Pulse:
    """Watches the schedulers of a server's process group.

    Args:
        patience: seconds of work without any processor time after which the server counts as hung.
    """

    def __init__(self, group: int, patience: float) -> None:
        self._group = group
        self._patience = patience
        self._ticks: int | None = None
        self._waited = 0.0
        self._looked = time.monotonic()

    def is_hung(self, has_work: bool) -> bool:
        """To be asked every second or more often."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LOOK), now
        ticks = scheduler_ticks(self._group) if has_work else None
        moved = ticks is None or ticks != self._ticks
        self._waited = 0.0 if moved else self._waited + passed
        self._ticks = ticks
        return self._waited > self._patience


def scheduler_ticks(group: int) -> int:
    """Processor time used by a process group's schedulers, in clock ticks; by all of it where none bears the name."""
    own, everyone = 0, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # "pid (name) state ppid pgrp ... utime stime": the name may hold spaces and brackets
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks = int(fields[11]) + int(fields[12])
                everyone += ticks
                if b"scheduler" in (stat.parent / "cmdline").read_bytes():
                    own += ticks
    return own or everyone

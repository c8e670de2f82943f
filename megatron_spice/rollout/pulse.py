"""Whether a server that was given work is doing any.

A server can hang in ways that no connection shows: its scheduler is stopped or waits for a lock, while its HTTP process
answers as ever. But a scheduler that works uses processor time, on a CPU for the arithmetic and on an accelerator for
polling. (One that spins on a hung kernel is for SGLang's own watchdog, which ends it.) Or it waits for a compiler: on an accelerator
kernels are compiled when they are first needed, which may be in the first game, and half a minute of nvcc each.

A scheduler that has ended is another matter: SGLang, told of it by its last signal, waits some seconds for an accelerator to
settle before it ends the rest. What is known at once need not be waited for.

What neither shows is an answer that got lost on its way: then everything works and nothing comes. So a server must answer
something of what it is asked from time to time. Not each request within a time: how long one waits in the queue of a busy
server depends on what is in front of it, and giving up a server that works would only ask the next one for the same again.

Time is counted in looks, each of a second at most: a machine that was suspended, trainer and all, owes nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOOK = 1.0  # seconds


class Silence:
    """Counts how long a server has answered nothing.

    Args:
        patience: seconds after which it is over.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.heard()

    def heard(self) -> None:
        """The server has answered, or had nothing to answer until now."""
        self._waited, self._looked = 0.0, time.monotonic()

    def is_too_long(self) -> bool:
        """To be asked every second or more often while there are requests, by as many as wait."""
        now = time.monotonic()
        self._waited += min(now - self._looked, LOOK)
        self._looked = now
        return self._waited > self._patience


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
        self._schedulers: set[int] = set()

    def ended(self) -> int | None:
        """The process id of a scheduler that was there and has ended, None if there is none."""
        self._schedulers |= scheduler_ids(self._group)
        return next((process for process in sorted(self._schedulers) if not _runs(process)), None)

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
    """Processor time used by a process group's schedulers and by other programs that they have started, in clock ticks; by all
    of the group where none bears the name.

    Only other programs: Python's processes that a scheduler keeps (torch's compile workers) look up each second, whatever it does.
    """
    members = {int(stat.parent.name): (stat, int(fields[1]), int(fields[11]) + int(fields[12])) for stat, fields in _members(group)}
    schedulers = {process for process, (stat, _, _) in members.items() if _is_scheduler(stat)}
    counted = set(schedulers)
    for process, (stat, parent, _) in members.items():
        while parent in members and parent not in schedulers:
            parent = members[parent][1]
        if parent in schedulers and _program(stat) != _program(members[parent][0]):
            counted.add(process)
    return sum(ticks for process, (_, _, ticks) in members.items() if process in counted or not schedulers)


def scheduler_ids(group: int) -> set[int]:
    """Process ids of a process group's schedulers, which are its leader's own children: what a scheduler starts bears its name
    as well, for a moment. One that has ended bears no name any more."""
    return {int(stat.parent.name) for stat, fields in _members(group) if int(fields[1]) == group and _is_scheduler(stat)}


def _members(group: int) -> Iterator[tuple[Path, list[str]]]:
    """The `stat` files of a process group's members, and what stands in them from the state on."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int((fields := _fields(stat))[2]) == group:
                yield stat, fields


def _fields(stat: Path) -> list[str]:
    # "pid (name) state ppid pgrp ... utime stime": the name may hold spaces and brackets
    return stat.read_text().rpartition(")")[2].split()


def _is_scheduler(stat: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"scheduler" in (stat.parent / "cmdline").read_bytes()
    return False


def _program(stat: Path) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(stat.parent / "exe")
    return None


def _runs(process: int) -> bool:
    try:
        return _fields(Path(f"/proc/{process}/stat"))[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False

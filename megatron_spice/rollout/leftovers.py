"""Shared memory that a killed server leaves behind.

SGLang gives names in /dev/shm to the queues of its tensor-parallel ranks (24 MiB each), to its load and to its semaphores,
and takes them away when it ends in good order. A killed one cannot. What its processes have mapped while they live tells
which names are theirs; their process ids in the names would not, where containers share /dev/shm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIXES = ("sgl_shm_mq_", "sglang_loads_", "sem.mp-")


def named_memory(group: int) -> set[Path]:
    """SGLang's files in /dev/shm that processes of a process group have mapped; none where there is no /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # "pid (name) state ppid pgrp ...": the name may hold spaces and brackets
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                found |= _mapped((stat.parent / "maps").read_text())
    return found


def _mapped(maps: str) -> set[Path]:
    paths = {Path(fields[5]) for line in maps.splitlines() if len(fields := line.split(None, 5)) == 6}
    return {path for path in paths if path.parent == SHARED_MEMORY and path.name.startswith(PREFIXES)}


def remove(files: Iterable[Path]) -> None:
    """Takes the names away, of those that still have one; for when their server has ended."""
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

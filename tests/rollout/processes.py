"""What is left of a server: its process group, and the files of shared memory that its processes have mapped."""

from __future__ import annotations

import contextlib
from pathlib import Path


def processes(group: int) -> list[int]:
    """The ids of a process group's members that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def shared_memory(*pids: int) -> set[Path]:
    """The files in /dev/shm that these processes have mapped and that still have a name."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    names = [line.split(None, 5)[5] for line in lines if "/dev/shm/" in line]
    return {Path(name) for name in names if not name.endswith("(deleted)")}

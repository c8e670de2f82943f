"""A server's processes: its group, how they were started, and the files of shared memory that they have mapped."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from megatron_spice.rollout.supervisor import SglangEngine


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


def assert_forked(engine: SglangEngine) -> None:
    """That an engine's processes share what the server has imported: importing SGLang takes each of them as long as the server
    otherwise. (Spawned ones would have a tracker beside them, too, of semaphores that have names.)"""
    server = psutil.Process(engine.pid)
    children = {process.name()[:14]: process for process in server.children(recursive=True)}
    assert set(children) == {"sglang::schedu", "sglang::detoke"}
    used, imported = children["sglang::detoke"].cpu_times().user, server.cpu_times().user
    assert used < 0.5 * imported, f"{used} s of a processor beside the server's {imported}"

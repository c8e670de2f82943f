"""Waiting until memory that was given up is really free, before somebody else takes it.

An engine answers that it has released its memory, and the driver may still show it as taken: other processes unmap it, and
on several accelerators not all at the same moment. Whoever takes memory then fails far from the cause. So both hand-overs wait
here first, and what they wait for is read from the driver. On a CPU nothing is waited for: memory is the kernel's, which hands
out what there is; the same states are passed and what is free is read all the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

GIB = 2**30
TIMEOUT = 60.0  # seconds
PAUSE = 0.01
NEARLY = 0.98
"""Share of what an engine gave back that must be free for it: others' small needs come and go."""


class NotFree(RuntimeError):
    """Memory that was to be free is not."""


def wait_until_free(needed: int, read_free: Callable[[], int], timeout: float, what: str, pause: float = PAUSE) -> float:
    """Returns as soon as `read_free` says that so many bytes are free.

    Args:
        what: who needs them, and what to do if they do not get them, for the error.
        pause: seconds between two looks.

    Returns:
        Seconds waited.

    Raises:
        NotFree: they are not after `timeout` seconds; names both numbers.
    """
    start = time.monotonic()
    while (free := read_free()) < needed:
        waited = time.monotonic() - start
        if waited >= timeout:
            raise NotFree(
                f"{needed / GIB:.2f} GiB were to be free and {free / GIB:.2f} GiB are, after {waited:.0f} s of waiting: {what}"
            )
        time.sleep(min(pause, timeout))
    return time.monotonic() - start


def free_on_device() -> int:
    """Bytes of this rank's accelerator that the driver shows as free, for whichever process."""
    import torch

    return torch.cuda.mem_get_info()[0]


def free_for_torch() -> int:
    """Bytes of this rank's accelerator that this process can have: those and what its own torch holds unused."""
    import torch

    return free_on_device() + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def give_back_unused() -> None:
    """Hands what this process's torch holds unused on its accelerator back to the driver, with blocks others had in hand."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def free_on_host(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine's kernel would give out, or the container's limit leaves where that is less; 0 if it cannot be
    told. Files that are cached count as free, as far as the kernel knows."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no limit ("max"), or no cgroup v2
    return max(0, free)


def held(device: str, process: Path = Path("/proc/self")) -> dict[str, float]:
    """Metrics of what this rank's process holds and what its machine has left, in GiB: the most that torch has held of the accelerator
    since the last call (on a CPU the process of the machine's memory), and what is free on the machine."""
    most = _most_on_device() if device == "cuda" else _most_on_host(process)
    return {"memory/most_held_gib": most / GIB, "memory/free_on_host_gib": free_on_host() / GIB}


def _most_on_device() -> int:
    import torch

    most = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return most


def _most_on_host(process: Path) -> int:
    """The kernel's own high-water mark, begun anew; where that may not be done, since the process began. 0 if it cannot be told."""
    try:
        lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        most = int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    with contextlib.suppress(OSError):
        (process / "clear_refs").write_text("5")
    return most


class EngineRoom:
    """What the engine on this rank's accelerator takes as it wakes, kind by kind, and waiting for it.

    An engine decides itself how much its KV cache takes, so the whole is measured as it sleeps for the first time.

    Args:
        device: "cuda", or "cpu" where nothing is waited for.
        weights: bytes of the engine's weights on one accelerator.
    """

    def __init__(self, device: str, weights: int) -> None:
        self._on_device = device == "cuda"
        self._weights = weights
        self._needed = {"weights": 0, "kv_cache": 0}

    def free(self) -> int:
        """Bytes free on this rank's device."""
        return free_on_device() if self._on_device else free_on_host()

    def measure(self, before: int) -> None:
        """Notes what an engine gave back: what is free now and was not `before`. Nothing where no engine is."""
        given_back = max(0, self.free() - before) if self._on_device else 0
        weights = min(self._weights, given_back)
        self._needed = {"weights": weights, "kv_cache": given_back - weights}

    def wait(self, kind: str, timeout: float = TIMEOUT) -> dict[str, float]:
        """Returns when an engine can take its memory of this kind ("weights", "kv_cache"). Returns metrics: GiB free.

        Raises:
            NotFree: it cannot after `timeout` seconds.
        """
        if self._on_device:
            give_back_unused()  # buckets, if the policy keeps its weights
            what = (
                f"an engine's {kind} wake; something else holds memory of this accelerator (nvidia-smi shows what), or lower "
                "rollout.memory_fraction, or use policy.sleep=all"
            )
            wait_until_free(int(NEARLY * self._needed[kind]), self.free, timeout, what)
        return {f"memory/free_for_{kind}_gib": self.free() / GIB}

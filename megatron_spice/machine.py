"""Facts about this machine, read without importing torch: accelerators, processor, memory, batch system, packages.

`doctor` prints them, `plan` and the launcher decide by them. Asking `nvidia-smi` and the package metadata takes
milliseconds; importing torch to ask it takes seconds, and Transformer Engine may not import at all on the wrong driver.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU as `nvidia-smi` names it; `memory_mib` is its whole memory."""

    name: str
    memory_mib: int
    driver: str


def accelerators() -> list[Accelerator]:
    """GPUs of this machine; empty where there is no working `nvidia-smi`."""
    text = output_of(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"])
    found = []
    for line in (text or "").splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[1].isdigit():
            found.append(Accelerator(parts[0], int(parts[1]), parts[2]))
    return found


@cache
def compute_capability() -> tuple[int, int] | None:
    """The lowest of this machine's GPUs: (9, 0) is Hopper. None without GPUs, or with a driver too old to be asked."""
    text = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    return min(((int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d+)", text)), default=None)


def output_of(command: list[str], timeout: float = 20.0) -> str | None:
    """What a command prints, None when it is not installed, fails or does not answer within `timeout` seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def processor() -> dict[str, object]:
    """Model, usable cores and the vector features that decide which CPU kernels are there."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    return {
        "model": model,
        "cores": usable_cores(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def usable_cores() -> int:
    """Cores this process may run on, which on a shared node are fewer than it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Physical memory, or the container's limit where that is lower; None where it cannot be told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass  # No limit ("max"), or no cgroup v2.
    return total / 2**30


def shared_memory_gib() -> float | None:
    """Size of /dev/shm, through which weights go to the engines on one node; containers give 64 MiB by default."""
    try:
        return shutil.disk_usage("/dev/shm").total / 2**30
    except OSError:
        return None


def version(distribution: str) -> str | None:
    """Installed version of a package by its distribution name, without importing it; None when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_version(*distributions: str) -> str | None:
    """Version of the first of several distributions that is installed (a package may come for several CUDA releases)."""
    return next((found for name in distributions if (found := version(name))), None)


def has_module(name: str) -> bool:
    """Whether a top-level module could be imported; it is not."""
    return importlib.util.find_spec(name) is not None


def import_failure(*modules: str, timeout: float = 120.0) -> str | None:
    """What keeps modules from being imported, one after the other, None if nothing does: the last line of a process of its own
    that tries, the signal that ended it, or that it took more than `timeout` seconds."""
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as child:
        try:
            said = child.communicate(timeout=timeout)[1].strip()
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # and what it has started, which may hold its output open
            return f"not imported within {timeout:g} s"
    if child.returncode == 0:
        return None
    last = said.splitlines()[-1][:500] if said else ""
    if child.returncode > 0:
        return last or f"exit code {child.returncode}"
    name = signal.Signals(-child.returncode).name if -child.returncode in list(signal.Signals) else -child.returncode
    return ", ".join(filter(None, [f"ended by signal {name}", last]))


def torch_cuda() -> str | None:
    """The release of CUDA that the installed torch was built for, read from its `version.py`; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    folders = (spec and spec.submodule_search_locations) or []
    for file in (Path(folder) / "version.py" for folder in folders):
        if file.is_file() and (found := re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", file.read_text(), re.MULTILINE)):
            return found[1]
    return None


@dataclass(frozen=True, slots=True)
class Apex:
    """`state` is "absent", "nvidia", "unbuilt" (NVIDIA's without its CUDA extensions) or "wrong": the `apex` of PyPI is another
    project with the same import name."""

    state: str
    version: str | None = None


def apex() -> Apex:
    """Which apex is installed, told apart by the `optimizers` package that only NVIDIA's has."""
    found = version("apex")
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex("absent")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    is_nvidia = any((folder / "optimizers").is_dir() for folder in folders)
    if not is_nvidia:
        return Apex("wrong", found)
    return Apex("nvidia" if has_module("amp_C") else "unbuilt", found)


def slurm() -> str | None:
    """Version of Slurm's client tools, None without them."""
    return output_of(["sinfo", "--version"])


def container_runtimes() -> list[str]:
    """Container tools on PATH that Slurm sites use."""
    return [name for name in ("enroot", "apptainer", "singularity", "podman", "docker") if shutil.which(name)]


def device(wanted: str) -> str:
    """Says "cpu" or "cuda" for `cluster.device`: "auto" takes CUDA where a GPU is listed."""
    if wanted == "auto":
        return "cuda" if accelerators() else "cpu"
    return wanted

"""Runs a function on several gloo ranks, each a process of its own, and returns what each gave back.

Where there is no GPU a rank is a copy of a process that has imported torch and Megatron already (multiprocessing's forkserver):
importing them takes a rank five seconds of a core, most of what a short test of four ranks would take. CUDA does not survive
a fork, so with GPUs each rank begins from nothing; and so it does on request.

Copies share what a run's ranks do not: the order in which Python goes through a set of strings, and objects at equal addresses.
What must not depend on that is tested with fresh ranks as well, each of which has another order than the others, the same each
time. And of a copy nobody sees how it ends, since it has to end by `os._exit`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
FORKS = shutil.which("nvidia-smi") is None
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
_COPIES = multiprocessing.get_context("forkserver")
_COPIES.set_forkserver_preload(["rank_imports"])


class _Process(Protocol):
    """What a started rank can be asked."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> object: ...


class _Copy:
    """A forked rank, with the interface of a `Popen`."""

    def __init__(self, *arguments: Any) -> None:
        with _environment(QUIET | {"PYTHONPATH": PATHS}):
            forkserver.ensure_running()
        self._process = _COPIES.Process(target=_forked, args=arguments)
        self._process.start()
        self.poll, self.kill, self.wait = lambda: self._process.exitcode, self._process.kill, self._process.join


def run_ranks(
    world_size: int, file: str | Path, function: str, *arguments: Any, timeout: float = 240, fresh: bool = not FORKS
) -> list[Any]:
    """Calls `function(*arguments)` of a Python file on `world_size` ranks, with torchrun's variables set. Fresh ones are no copies:
    they have imported nothing.

    Raises:
        AssertionError: a rank failed; with its output.
        TimeoutError: they take longer than `timeout` seconds.
    """
    try:
        return _run_ranks(world_size, file, function, arguments, timeout, fresh)
    except AssertionError as error:
        # A free port is found before the ranks are there to take it; somebody else may have been quicker.
        if "EADDRINUSE" not in str(error):
            raise
    return _run_ranks(world_size, file, function, arguments, timeout, fresh)


def _run_ranks(
    world_size: int, file: str | Path, function: str, arguments: tuple[Any, ...], timeout: float, fresh: bool
) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request"
        request.write_bytes(pickle.dumps((str(file), function, arguments)))
        processes: list[_Process] = []
        for rank in range(world_size):
            environment = os.environ | QUIET | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join([PATHS, os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            if fresh:
                environment["PYTHONHASHSEED"] = str(rank)
            log = Path(folder) / f"log{rank}"
            processes.append((_fresh if fresh else _Copy)(environment, str(log), str(request), folder))
        try:
            codes = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        logs = [(Path(folder) / f"log{rank}").read_text() for rank in range(world_size)]
        failed = [rank for rank, code in enumerate(codes) if code != 0]
        assert not failed, "\n".join(f"rank {rank} (exit code {codes[rank]}):\n{logs[rank][-4000:]}" for rank in failed)
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: Sequence[_Process], timeout: float) -> list[int | None]:
    """The exit codes. A rank that fails ends the wait: the others would sit in a collective until it times out."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {[rank for rank, code in enumerate(codes) if code is None]} still run after {timeout} s")
        time.sleep(0.05)


def _fresh(environment: dict[str, str], log: str, request: str, folder: str) -> subprocess.Popen[bytes]:
    with open(log, "w") as written:
        return subprocess.Popen([sys.executable, __file__, request, folder], env=environment, stdout=written, stderr=written)


def _forked(environment: dict[str, str], log: str, request: str, folder: str) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ.clear()
    os.environ.update(environment)
    import numpy as np

    np.random.seed()  # as Python's own generator is after a fork
    _main(request, folder)
    # Threads that gloo has left would have the ordinary end wait, or worse.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(request: str, folder: str) -> None:
    file, function, arguments = pickle.loads(Path(request).read_bytes())
    spec = importlib.util.spec_from_file_location("on_ranks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, function)(*arguments)
    (Path(folder) / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])

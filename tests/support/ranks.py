"""Runs a function on several gloo ranks, each a process of its own, and returns what each gave back."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(world_size: int, file: str | Path, function: str, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Calls `function(*arguments)` of a Python file on `world_size` ranks, with torchrun's variables set.

    Raises:
        AssertionError: a rank failed; with its output.
        TimeoutError: they take longer than `timeout` seconds.
    """
    try:
        return _run_ranks(world_size, file, function, arguments, timeout)
    except AssertionError as error:
        # A free port is found before the ranks are there to take it; somebody else may have been quicker.
        if "EADDRINUSE" not in str(error):
            raise
    return _run_ranks(world_size, file, function, arguments, timeout)


def _run_ranks(world_size: int, file: str | Path, function: str, arguments: tuple[Any, ...], timeout: float) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request"
        request.write_bytes(pickle.dumps((str(file), function, arguments)))
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            log = open(Path(folder) / f"log{rank}", "w")
            processes.append(
                subprocess.Popen([sys.executable, __file__, str(request), folder], env=environment, stdout=log, stderr=log)
            )
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


def _wait(processes: list[subprocess.Popen], timeout: float) -> list[int | None]:
    """The exit codes. A rank that fails ends the wait: the others would sit in a collective until it times out."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {[rank for rank, code in enumerate(codes) if code is None]} still run after {timeout} s")
        time.sleep(0.05)


def _main(request: str, folder: str) -> None:
    import importlib.util

    file, function, arguments = pickle.loads(Path(request).read_bytes())
    spec = importlib.util.spec_from_file_location("on_ranks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, function)(*arguments)
    (Path(folder) / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])

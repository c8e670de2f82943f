"""Runs a benchmark's job in ranks of this machine, fresh ones for each, so that a job's memory and its caches are its own.

The ranks are started as torchrun would start them. They never outlive this process, have a limit of time, and what they
leave in their temporary folder goes with it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_spice.cluster.children import Child
from megatron_spice.cluster.host_memory import TUNABLES

BENCHMARK = Path(__file__).with_name("benchmark.py")


def run(job: dict[str, Any]) -> dict[str, Any] | None:
    """Runs `job["ranks"]` ranks with `job["threads"]` CPU threads each, for `job["time_limit"]` seconds at most.

    Returns: what the first rank measured; None when a rank failed or time was up, which is printed with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="spice-benchmark-") as folder:
        result = Path(folder) / "result.json"
        ranks: list[Child] = []
        try:
            for environment in _environments(job["ranks"], job["threads"]):
                command = [sys.executable, str(BENCHMARK), "rank", json.dumps(job), str(result)]
                log = Path(folder) / f"rank{len(ranks)}.log"
                ranks.append(Child(command, log_path=log, environment=environment, grace=30.0))
            failure = _wait(ranks, time.monotonic() + job["time_limit"], job["time_limit"])
        finally:
            for rank in ranks:
                rank.stop()
        if failure is not None:
            print(failure, file=sys.stderr)
            return None
        return json.loads(result.read_text())


def _environments(ranks: int, threads: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": TUNABLES,
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(ranks: list[Child], deadline: float, limit: float) -> str | None:
    """Returns when all have ended, or one has failed, or the time is up; what went wrong, None if nothing did."""
    while None in (codes := [rank.exit_code() for rank in ranks]) and not any(codes):
        if time.monotonic() > deadline:
            return f"not done within {limit:g} s (--time-limit); rank 0's last words:\n{ranks[0].log_tail()}"
        time.sleep(0.2)
    for number, code in enumerate(codes):
        if code:
            return f"rank {number} failed with exit code {code}:\n{ranks[number].log_tail(40)}"
    return None

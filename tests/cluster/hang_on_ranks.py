"""A run in small, of real ranks that reduce a number in turns, in which one hangs as it is told: `hang_on_ranks.py HOW RUN_DIR`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_spice.cluster import watchdog
from megatron_spice.cluster.distributed import process_group
from megatron_spice.cluster.topology import from_environment
from megatron_spice.cluster.whereabouts import HERE, moved
from megatron_spice.telemetry import rank_log
from megatron_spice.telemetry.timer import PhaseTimer

TIMEOUT = 1.5


def ask_for_ever() -> None:
    """What the test looks for in the stacks."""
    time.sleep(600)


def fill(log: Path) -> None:
    """Of a named pipe that nobody reads: what is written from here on never returns, as on a file system that has died."""
    pipe = os.open(log, os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        try:
            while True:
                os.write(pipe, b"." * size)
        except BlockingIOError:
            pass
    os.close(pipe)


def main(how: str, run_dir: Path) -> None:
    topology = from_environment("cpu")
    if how == "dead log":
        watchdog._PATIENCE = 2.0
    with rank_log.RankLog(run_dir, topology.rank, topology.world_size, interrupted_code=75), process_group(topology, TIMEOUT) as store:
        guard = watchdog.Watchdog(
            topology, store, TIMEOUT, host=f"node{topology.node_rank}", log_of=lambda rank: rank_log.path_of(run_dir, rank),
            mark=lambda why: rank_log.mark(rank_log.path_of(run_dir, topology.rank), rank_log.FAILED, why), tell=rank_log.tell,
        )  # fmt: skip
        with guard:
            _iterate(how, topology.rank, PhaseTimer(on_phase=HERE.enter), rank_log.path_of(run_dir, topology.rank))


def _iterate(how: str, rank: int, timer: PhaseTimer, log: Path) -> None:
    with timer.phase("sync"):
        dist.barrier()
    with timer.phase("play"):
        # Longer than the timeout, with signs of life; nobody waits for it in a collective.
        for _ in range(10):
            time.sleep(TIMEOUT / 5)
            moved()
    with timer.phase("train"):
        dist.all_reduce(torch.ones(1))
        time.sleep(0.3)  # so that all have said that they are here
        if how == "dead log":
            fill(log)
            if rank == 1:
                print("a word that never gets there")
        if how == "sleep" and rank == 1:
            ask_for_ever()
        if how == "stop" and rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

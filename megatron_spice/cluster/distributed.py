"""The process group that everything else is built on, and the store that ranks count and signal through."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_spice.cluster.topology import Topology


def collective_timeout(timeout: float) -> float:
    """Seconds that a collective or a wait on the store may take, if a run may stand still for `timeout`: so much more that the
    watchdog, which knows who hangs, speaks first."""
    return timeout + max(10.0, timeout / 4)


@contextmanager
def process_group(topology: Topology, timeout: float) -> Iterator[dist.Store]:
    """The world group (gloo on CPU; gloo and NCCL on CUDA) for the length of the block; yields its key-value store.

    `collective_timeout(timeout)` bounds every collective and every wait on the store, so a lost peer becomes an error with a name.
    """
    if topology.device == "cuda":
        torch.cuda.set_device(topology.local_rank)
    backend = "gloo" if topology.device == "cpu" else "cpu:gloo,cuda:nccl"
    _share_a_loop()
    dist.init_process_group(backend, timeout=timedelta(seconds=collective_timeout(timeout)))
    store = dist.distributed_c10d._get_default_store()
    try:
        yield dist.PrefixStore("spice", store)
    except BaseException:
        # A rank that fails must not wait for the others: torchrun ends them. Destroying is local under gloo; NCCL's waits for
        # ranks that do not come, and nobody would hear what has failed.
        if topology.device == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _share_a_loop() -> None:
    """All gloo groups that torch makes from here on share one thread that listens to their sockets.

    Torch gives each its own, which looks up a hundred times a second (gloo/transport/tcp/loop.cc). Megatron makes some twenty groups
    a rank, most of them of that rank alone: without a word said they took 2 % of a core a rank.
    """
    if "," in (interface := os.environ.get("GLOO_SOCKET_IFNAME", "")):
        return  # several interfaces are used in turn, a device each
    plain = dist.ProcessGroupGloo
    device = plain.create_device(interface=interface) if interface else plain.create_default_device()

    class SharedLoop(plain):  # type: ignore[misc, valid-type]
        """A gloo group on the common device; made as torch makes its own (`_new_process_group_helper`)."""

        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options: Any = plain._Options()
            options._timeout, options._threads, options._devices = timeout, 2, [device]
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = SharedLoop

"""The process group that everything else is built on, and the store that ranks count and signal through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

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

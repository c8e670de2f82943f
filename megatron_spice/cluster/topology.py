"""Where this process stands: its rank, its node, its device. Read once from the variables that torchrun sets."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """One process among `world_size`; nodes hold `local_world_size` each, in order of rank. `device` is "cpu" or "cuda"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: str = "cpu"

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def is_first(self) -> bool:
        """The rank that prints and writes files."""
        return self.rank == 0


def from_environment(device: str) -> Topology:
    """The topology torchrun gave this process.

    Raises:
        RuntimeError: the variables are missing: the process was not started by torchrun.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} not set: training ranks are started by torchrun; use `bash slurm/spice.sh RECIPE`"
        )
    rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
    return Topology(rank, world_size, local_rank, local_world_size, device)

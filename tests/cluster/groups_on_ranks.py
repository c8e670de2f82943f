"""What `test_distributed.py` does on each rank: many groups at once, one of them in each of a few threads."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
import torch.distributed as dist

from megatron_spice.cluster import distributed, topology


def use_many_groups(count: int) -> dict[str, Any]:
    """`count` groups of all ranks, and one of each rank alone."""
    with distributed.process_group(topology.from_environment("cpu"), 60):
        return _use(count, dist.get_world_size())


def _use(count: int, size: int) -> dict[str, Any]:
    groups = [dist.new_group() for _ in range(count)]
    for rank in range(size):
        dist.new_group([rank])
    wrong: list[str] = []

    def work(index: int) -> None:
        for step in range(20):
            summed = torch.full((1000 * (index + 1),), float(dist.get_rank() + step + index))
            dist.all_reduce(summed, group=groups[index])
            if not (summed == size * (step + index) + sum(range(size))).all():
                wrong.append(f"group {index}, step {step}: {summed[0].item()}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [open(f"/proc/self/task/{task}/comm", encoding="utf-8").read().strip() for task in os.listdir("/proc/self/task")]
    return {"wrong": wrong, "loops": names.count("gloo_tcp_loop")}

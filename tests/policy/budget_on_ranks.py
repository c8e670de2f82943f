"""What test_memory_budget.py measures on ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_spice.game.records import Trajectory


def measured(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each job's policy on this rank: bytes of weights, gradients and optimiser state after an update, its pipeline stage,
    the most that an update allocates beside them, and what autograd saves of one row.

    The peak is right only where ranks exchange little: what gloo's threads free is not seen by the profiler, which is of one
    thread.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    from memory_on_ranks import held, make_policy

    from megatron_spice.cluster import distributed, platform, topology

    device = platform.prepare("cpu")
    from megatron_spice.policy.loss import LossSettings

    here = topology.from_environment(device)
    found = []
    with distributed.process_group(here, 120):
        for job in jobs:
            made = make_policy(here, **job)
            rows = rows_of(job["tokens_per_microbatch"], 8)
            made.update(rows)  # what is made once, such as gloo's own buffers, is there
            peak, saved = peak_of(lambda: made.update(rows)), 0
            if made.layout.pipeline == 1:
                plan = made._plan(rows[: made.layout.data])
                saved = saved_by(lambda: made._step(made._tensors(plan), LossSettings.of(made.policy_config, False)), made)
            found.append({**held(made), "snapshot": snapshot_bytes(made), "stage": made.placement.pipeline_rank, "peak": peak, "saved": saved})
            made.close()
    return found


def snapshot_bytes(policy: Any) -> int:
    """Host memory that a save keeps."""
    from megatron_spice.checkpoint.snapshot import Snapshot

    snapshot = Snapshot()
    snapshot.take(policy.holdings(with_optimizer=True).pieces)
    return snapshot.num_bytes


def rows_of(tokens: int, count: int) -> list[Trajectory]:
    """Trajectories of `tokens` tokens each, three quarters of them the completion's."""
    prompt, completion = tokens // 4, tokens - tokens // 4
    return [
        Trajectory(
            "challenger", tuple((number + place) % 400 for place in range(prompt)), tuple(range(completion)),
            (-1.0,) * completion, advantage=1.0 if number % 2 else -1.0, reward=0.0,
        )
        for number in range(count)
    ]  # fmt: skip


def peak_of(work: Any) -> int:
    """The most bytes that torch holds during `work` beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_by(work: Any, policy: Any) -> int:
    """Bytes of the storages that autograd saves during `work`, one forward and backward, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in policy.sleeper.weight_buffers()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())

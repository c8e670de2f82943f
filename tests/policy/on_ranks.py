"""What policy tests do on ranks: one process start for many layouts, since importing Megatron takes most of a test's time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def in_layouts(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job builds a policy and does what the job asks: scores, a few updates, gathered weights, save or load.

    A job: {"model": folder, "overrides": {room: {key: value}}, "trajectories": [...], "updates": n, "score": ids,
    "gather": bool, "save": folder, "load": folder}.
    """
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [_one(job, here) for job in jobs]


def _one(job: dict[str, Any], here: Any) -> dict[str, Any]:
    from megatron_spice.checkpoint.checkpointer import load_tensors, save_tensors
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.policy import Policy

    model = Path(job["model"])
    rooms: dict[str, Any] = {
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"},
        "policy": {"model": model, "precision": "fp32", "learning_rate": 1e-2},
        "rollout": {"bucket_mb": 1}, "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
    }  # fmt: skip
    for room, values in job.get("overrides", {}).items():
        rooms[room] = {**rooms.get(room, {}), **values}
    policy = Policy(Config.model_validate(rooms), read_architecture(model), here)
    result: dict[str, Any] = {}
    try:
        if "load" in job:
            load_tensors(policy, Path(job["load"]), with_optimizer=job.get("with_optimizer", True))
        else:
            policy.load_hf(model)
        if "score" in job:
            result["score"] = policy.score(job["score"])
        result["updates"] = [policy.update(job["trajectories"]) for _ in range(job.get("updates", 0))]
        if "save" in job:
            weights = Path(job["save"]) / "weights"
            if here.rank == 0:
                weights.mkdir(parents=True)
            torch.distributed.barrier()
            save_tensors(policy, weights, with_optimizer=True)
        if job.get("gather"):
            result["weights"] = {
                name: tensor.clone().numpy() for bucket in policy.hf_buckets() for name, tensor in bucket.items()
            }
        if job.get("updates_after"):
            result["updates"] += [policy.update(job["trajectories"]) for _ in range(job["updates_after"])]
    finally:
        policy.close()
    return result


def tensor_parallel_logprobs(hidden: Any, weight: Any, labels: Any, vocab_size: int, temperature: float) -> Any:
    """Log-probs, entropies and gradients of a vocabulary split over the ranks; the gradient of this rank's rows."""
    import torch.distributed as dist

    from megatron_spice.policy.logprobs import token_logprobs

    dist.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = weight.shape[0] // size
    hidden = hidden.clone().requires_grad_()
    mine = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    logprobs, entropies = token_logprobs(
        hidden, mine, labels, temperature=temperature, chunk=3, vocab_start=rank * rows, vocab_size=vocab_size,
        group=dist.group.WORLD,
    )  # fmt: skip
    (logprobs * torch.arange(1.0, len(labels) + 1)).sum().backward()
    dist.destroy_process_group()
    return logprobs.detach(), entropies, hidden.grad, mine.grad

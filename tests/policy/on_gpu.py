"""What the tests of a GPU do on it, in a process of their own: a policy for each job, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def learn(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A job: {"model": folder, "policy": settings, "trajectories": [...], "score": ids, "updates": n, "sleeps": bool}."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cuda"))
    with distributed.process_group(here, 120):
        return [_one(job, here) for job in jobs]


def _one(job: dict[str, Any], here: Any) -> dict[str, Any]:
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.policy import Policy

    model = Path(job["model"])
    config = Config.model_validate({
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"}, "rollout": {"bucket_mb": 1},
        "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
        "policy": {"model": model, "learning_rate": 1e-3, **job["policy"]},
    })  # fmt: skip
    policy = Policy(config, read_architecture(model), here)
    policy.load_hf(model)
    result: dict[str, Any] = {"score": policy.score(job["score"]), "describe": policy.describe(), "updates": [], "slept": []}
    for _ in range(job["updates"]):
        result["updates"].append(policy.update(job["trajectories"]))
        if job.get("sleeps"):
            before = _copies(policy)
            slept = policy.sleep(keep_weights=True) | policy.sleep_weights()
            free = torch.cuda.mem_get_info()[0]
            result["slept"].append({**slept, **policy.wake(), "free": free, "same": _same(before, _copies(policy))})
    result["audit"] = policy.audit_lines()
    result["sent"] = {name: tensor.float().cpu().numpy() for bucket in policy.rollout_buckets() for name, tensor in bucket.items()}
    return result


def _copies(policy: Any) -> list[torch.Tensor]:
    from megatron_spice.policy.memory import optimizer_tensors

    return [tensor.detach().clone() for tensor in (*policy.sleeper.weight_buffers(), *optimizer_tensors(policy.optimizer))]


def _same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(here, there) for here, there in zip(before, after, strict=True))

"""Saves and loads on gloo ranks; run by test_formats.py."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch


def in_turn(jobs: list[dict[str, Any]]) -> list[Any]:
    """For each job a policy: it loads `load` or learns a little, and is saved into `save`, and by Megatron itself into `rival`."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [_one(job, here) for job in jobs]


def _one(job: dict[str, Any], here: Any) -> None:
    from policy_weights import save_tensors

    from megatron_spice.checkpoint.checkpointer import load_tensors
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.policy import Policy

    model = Path(job["model"])
    settings = {"model": model, "precision": "fp32", "learning_rate": 1e-2, **job["policy"]}
    game = {"challenger_max_tokens": 16, "reasoner_max_tokens": 16}
    config = Config.model_validate({"run": {"dir": "/"}, "corpus": {"path": "/"}, "policy": settings, "game": game})
    policy = Policy(config, read_architecture(model), here)
    if "load" in job:
        load_tensors(policy, job["load"], with_optimizer=True)
    else:
        policy.load_hf(model)
        for _ in range(2):
            policy.update(job["trajectories"])
    for name in ("save", "rival"):
        if name not in job:
            continue
        folder = job[name] / "weights"
        if here.is_first:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        if name == "save":
            save_tensors(policy, folder, with_optimizer=True)
        else:
            _save_by_megatron(policy, folder)
    policy.close()


def _save_by_megatron(policy: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_spice.policy.optimizer import SHARDING

    # Its writer would start a process for its results, of use only when the save itself runs in another one.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    model_state = policy.model_state()
    optimizer_state = policy.optimizer.sharded_state_dict(model_state, is_loading=False, metadata=SHARDING)
    dist_checkpointing.save({"model": model_state, "optimizer": optimizer_state}, str(folder))

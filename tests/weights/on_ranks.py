"""Ranks that train a little and sync to a real engine, for test_sync.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def train_and_sync(model: str, degrees: dict[str, int], trajectories: list[Any], folder: str) -> dict[str, Any]:
    """One update, a sync to an SGLang server hosted by rank 0 in the order of the driver, both sides giving up what they
    can, an export; then a sync in which one bucket is corrupted."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))  # before anything that imports Megatron

    from hf_folders import write_tensors

    from policy_weights import hf_buckets, hf_names

    from megatron_spice.checkpoint.hf_files import copy_small_files
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.game.records import Sampling
    from megatron_spice.policy.policy import Policy
    from megatron_spice.rollout.crew import Crew
    from megatron_spice.rollout.engine import KV_CACHE, WEIGHTS
    from megatron_spice.rollout.supervisor import SglangEngine
    from megatron_spice.weights import sync

    config = Config.model_validate({
        "run": {"dir": folder}, "corpus": {"path": folder},
        "policy": {"model": model, "precision": "fp32", "learning_rate": 1e-2, "sleep": "all", **degrees},
        "rollout": {"bucket_mb": 1, "max_total_tokens": 1024, "max_running_requests": 4},
    })  # fmt: skip
    engines = []
    if here.is_first:
        engines = [SglangEngine(config.rollout, here, "fp32", Path(model), Path(folder) / "engine.log")]
        engines[0].launch()
    result: dict[str, Any] = {}
    with distributed.process_group(here, 180):
        policy = Policy(config, read_architecture(Path(model)), here)
        try:
            policy.load_hf(Path(model))
            for engine in engines:
                engine.wait_ready()
            policy.update(trajectories)
            probe = list(range(5, 60))
            for engine in engines:
                engine.sleep()
            policy.sleep(keep_weights=True)
            for engine in engines:
                engine.wake([WEIGHTS])
            result["bytes"] = sync.push(lambda: hf_buckets(policy), hf_names(policy), Crew(engines), "7")[1]
            ours = policy.score(probe)
            policy.sleep_weights()
            for engine in engines:
                engine.wake([KV_CACHE])
            result["difference"] = sync.verify(ours, Crew(engines), probe, 0.02)
            policy.wake()
            exported = [(name, tensor.clone()) for bucket in hf_buckets(policy) for name, tensor in bucket.items()]
            if here.is_first:
                copy_small_files(Path(model), Path(folder) / "exported")
                write_tensors(Path(folder) / "exported", dict(exported))
                result["version"] = engines[0].weight_version()
                [completion] = asyncio.run(_greedy(engines[0], Sampling(temperature=0.0, max_new_tokens=8)))
                result["greedy"] = completion.completion_ids
            result["noticed"] = _corrupted_sync(policy, Crew(engines), probe, sync)
            try:
                sync.push(lambda: _without_their_last(hf_buckets(policy)), hf_names(policy), Crew([]), "9")
            except sync.SyncMismatch as error:
                result["lost"] = str(error)
        finally:
            policy.close()
            for engine in engines:
                engine.close()
        dist.barrier()
    return result


def _without_their_last(buckets: Any) -> list[dict[str, torch.Tensor]]:
    return [dict(list(bucket.items())[:-1]) for bucket in buckets]


async def _greedy(engine: Any, sampling: Any) -> Any:
    try:
        return await engine.generate([10, 20, 30, 40], 1, sampling)
    finally:
        await engine.close_requests()


def _corrupted_sync(policy: Any, crew: Any, probe: list[int], sync: Any) -> str:
    """Sends one tensor with its rows in another order, as a wrong offset in a buffer would; what verify then says."""

    from policy_weights import hf_buckets, hf_names

    def buckets() -> Any:
        for bucket in hf_buckets(policy):
            name = next((name for name in bucket if name.endswith("2.mlp.down_proj.weight")), None)
            yield bucket if name is None else {**bucket, name: torch.roll(bucket[name], 1, 0).contiguous()}

    sync.push(buckets, hf_names(policy), crew, "8")
    try:
        sync.verify(policy.score(probe), crew, probe, 0.02)
    except sync.SyncMismatch as error:
        return str(error)
    return ""

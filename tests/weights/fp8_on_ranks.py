"""Ranks of an FP8 policy that send FP8 weights to a real engine, for test_fp8_engine.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def send_to_both(model: str, policy_settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Sends a policy's weights to two engines of rank 0, as FP8 numbers and as bfloat16 ones rounded to FP8 and back.

    Returns:
        On rank 0 what was sent, and what both engines and the policy make of a text; on others how many buckets came.
    """
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))

    from policy_weights import hf_names

    from megatron_spice.config.engine_weights import quantization_config
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy import precision
    from megatron_spice.policy.policy import Policy
    from megatron_spice.rollout.buckets import Parcel
    from megatron_spice.rollout.crew import Crew
    from megatron_spice.rollout.supervisor import SglangEngine
    from megatron_spice.weights import sync

    config = Config.model_validate({
        "run": {"dir": folder}, "corpus": {"path": folder},
        "policy": {"model": model, "precision": "fp8", **policy_settings},
        "rollout": {"weights": "fp8", "bucket_mb": 1, "threads": 1, "max_total_tokens": 1024, "max_running_requests": 4},
    })  # fmt: skip
    architecture = read_architecture(Path(model))
    told = quantization_config(config.policy, architecture)
    engines = []
    if here.is_first:
        for name, quantization in (("fp8", told), ("rounded", None)):
            log = Path(folder) / f"{name}.log"
            engines.append(SglangEngine(config.rollout, here, "fp8", Path(model), log, quantization=quantization))
            engines[-1].launch()
    with distributed.process_group(here, 180):
        policy = Policy(config, architecture, here)
        try:
            policy.load_hf(Path(model))
            rounding = precision.rounded_weights(policy.chunks, policy.policy_config)
            result = {"sent": _copied(policy.rollout_buckets())}
            result["rounded"] = _copied(policy.gatherer.buckets(policy.parameters, rounding, hosts_only=True))
            for engine in engines:
                engine.wait_ready()
            fp8, rounded = Crew(engines[:1]), Crew(engines[1:])
            parcel, names, probe = Parcel(), policy.rollout_names, list(range(5, 60))
            result["bytes"] = sync.push(lambda: policy.rollout_buckets(parcel), names, fp8, "1")[1]
            sync.push(
                lambda: policy.gatherer.buckets(policy.parameters, rounding, parcel, hosts_only=True), hf_names(policy), rounded, "1"
            )
            result["policy"] = policy.score(probe)
            result["engines"] = [engine.score(probe) for engine in engines]
            if engines:
                result["reset"] = _random_parameters(engines[0])
            sync.push(lambda: policy.rollout_buckets(parcel), names, fp8, "2")
            if engines:
                result["again"] = engines[0].score(probe)
            assert not fp8.num_lost and not rounded.num_lost
        finally:
            policy.close()
            for engine in engines:
                engine.close()
        dist.barrier()
    return result


def _copied(buckets: Any) -> dict[str, Any]:
    """Type, shape and bytes of each tensor: torch does not pickle FP8 ones."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).clone().numpy())
        for bucket in buckets
        for name, tensor in bucket.items()
    }


def _random_parameters(engine: Any) -> bool:
    """Has SGLang fill all of its parameters with random numbers. (Its comparison of them wants a CUDA device.)"""
    return engine.client._http.ask("POST", "/weights_checker", {"action": "reset_tensors"})["success"]

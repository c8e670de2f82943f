"""Where engines live and with which settings: pure functions, so that a layout can be checked without starting one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import Precision, RolloutConfig
from megatron_spice.config.server_keys import server_key_problems
from megatron_spice.cluster.topology import Topology
from megatron_spice.rollout.bucket_loader import LOADER


def hosted_engine(local_rank: int, ranks_per_node: int, engines_per_node: int) -> int | None:
    """Which of its node's engines this rank hosts, or None.

    Engines are spread evenly: engine e belongs to local rank e * (ranks_per_node // engines_per_node), and the ranks up
    to the next host lend it their accelerators.

    Raises:
        ValueError: there are more engines than ranks.
    """
    if engines_per_node > ranks_per_node:
        raise ValueError(
            f"rollout.engines_per_node={engines_per_node} is more than the {ranks_per_node} ranks of a node; "
            f"set it to {ranks_per_node} or less"
        )
    engine, offset = divmod(local_rank, ranks_per_node // engines_per_node)
    return engine if offset == 0 and engine < engines_per_node else None


def remote_engines(rank: int, world_size: int, urls: Sequence[str]) -> list[str]:
    """Which of the servers that run already this rank talks to: they are spread over all ranks, and with more servers than
    ranks each rank has several, as evenly as can be. (2 of 8 ranks: 0 and 4.)"""
    return [url for number, url in enumerate(urls) if number * world_size // len(urls) == rank]


def threads_per_rank(config: RolloutConfig) -> int:
    """CPU threads of each of an engine's tensor-parallel ranks: what is configured, else the cores shared out."""
    if config.threads is not None:
        return config.threads
    return max(1, len(os.sched_getaffinity(0)) // (config.engines_per_node * config.tensor_parallel_size))


def cpu_binding(cores: Sequence[int], ranks: int, threads: int) -> str:
    """Which cores each of an engine's CPU ranks is bound to, in SGLang's notation: `0,1|2,3`.

    Without it SGLang takes as many ranks as there are NUMA nodes and no more. Cores are given again where they run out.
    """
    share = [[cores[(rank * threads + thread) % len(cores)] for thread in range(threads)] for rank in range(ranks)]
    return "|".join(",".join(map(str, sorted(set(each)))) for each in share)


def server_settings(
    config: RolloutConfig, topology: Topology, precision: Precision, model: Path, *, port: int, rendezvous_port: int,
    load_format: str = "dummy", quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `sglang_server.py` gets: {"server": SGLang's own settings, "cpu_threads": int or None,
    "cpu_binding": only for several CPU ranks}.

    `model` is a Hugging Face folder. With `load_format` "dummy" only its config and tokenizer are read: the weights
    come by sync before anything is generated. "auto" reads its weights too. `quantization` is the `quantization_config`
    that the model's config shall have (`config/engine_weights.py`); None: its own.
    """
    server = {
        "model_path": str(model),
        "load_format": load_format,
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}[precision],  # weights are kept in bfloat16
        "host": "127.0.0.1",
        "port": port,
        "nccl_port": rendezvous_port,
        "tp_size": config.tensor_parallel_size,
        "mem_fraction_static": config.memory_fraction,
        "max_running_requests": config.max_running_requests,
        "context_length": config.context_length,
        # Different engines must not sample the same completions.
        "random_seed": config.seed + topology.rank,
        # Ours waits for /ready and sends weights first; a warm-up would generate from random ones.
        "skip_server_warmup": True,
        "custom_weight_loader": [LOADER],
        "enable_deterministic_inference": config.deterministic,
        "log_level": "info",
        "log_level_http": "warning",
    }
    if quantization is not None:
        server["json_model_override_args"] = json.dumps({"quantization_config": quantization})
    if topology.device == "cuda":
        server |= {"base_gpu_id": topology.local_rank, "enable_memory_saver": True}
        return {"server": _with_more(server, config, topology), "cpu_threads": None}
    server |= {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "max_total_tokens": config.max_total_tokens,
        # Between requests and while the trainer works the scheduler must not poll.
        "sleep_on_idle": True,
        # Of more, processes between would be in charge, which do not know that they are forked (`sglang_server.py`). More of the
        # first are a recipe's rollout.engines_per_node.
        "dp_size": 1,
        "detokenizer_worker_num": 1,
    }
    threads = threads_per_rank(config)
    settings = {"server": _with_more(server, config, topology), "cpu_threads": threads}
    if config.tensor_parallel_size > 1:
        settings["cpu_binding"] = cpu_binding(sorted(os.sched_getaffinity(0)), config.tensor_parallel_size, threads)
    return settings


def _with_more(server: dict[str, Any], config: RolloutConfig, topology: Topology) -> dict[str, Any]:
    """The server's settings and those of `rollout.server`.

    Raises:
        ConfigError: one of these is decided already, by other keys of the recipe or by what this code relies on.
    """
    if problems := server_key_problems(config, topology.device):
        raise ConfigError(problems)
    return config.server | server

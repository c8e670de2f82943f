"""A recipe's engines: how many sequences one decodes at a time, and how long a full one may answer nothing.

Requests that do not fit an engine wait in its queue, as long as it takes: what bounds them is `rollout.request_timeout`, for which
an engine with requests may answer none of them. The longest that a full engine takes between two answers is about what a
request takes whose completions, and all others beside it, have their full length.
"""

from __future__ import annotations

import math

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config
from megatron_spice.cost.device import Device
from megatron_spice.cost.play import Batch, EngineShape, batch_work
from megatron_spice.cost.workload import Workload
from megatron_spice.policy import memory_budget

MARGIN = 2.0  # of the timeout over that: it is modelled, by constants that may be assumed


def engine_shape(config: Config, architecture: ModelArchitecture, layout: ParallelLayout, device: Device, memory: int) -> EngineShape:
    """Engines that share devices of `memory` bytes with the policy. Their KV caches hold what the memory table says; that of servers
    which run elsewhere is not known, and taken as enough."""
    place = memory_budget.Device("cpu" if device.on_cpu else "cuda", memory, device.name)
    cache = memory_budget.budget(config, architecture, layout, place).cache_tokens
    kv_tokens = math.inf if cache is None else float(cache)
    size = 4.0 if config.policy.precision == "fp32" else 1.0 if config.rollout.weights == "fp8" else 2.0
    return EngineShape(config.rollout.tensor_parallel_size, config.rollout.max_running_requests, kv_tokens, size, max(2.0, size))


def longest_silence(config: Config, architecture: ModelArchitecture, shape: EngineShape, device: Device) -> float:
    """Seconds for which an engine may answer nothing although it works."""
    load, in_flight = Workload.of(config), config.rollout.passages_in_flight
    found = 0.0
    for wanted, prompt, limit in (
        (load.attempts, load.challenger_prompt, load.challenger_limit),
        (load.tasks * load.group, load.reasoner_prompt, load.reasoner_limit),
    ):
        request = Batch(1, prompt, [float(limit)] * load.group)
        together = max(load.group, min(round(in_flight * wanted), int(shape.fitting(request))))
        beside = Batch(math.ceil(together / load.group), prompt, [float(limit)] * together)
        found = max(found, device.seconds(batch_work(architecture, shape, beside)))
    return found


def silence_warnings(config: Config, architecture: ModelArchitecture, shape: EngineShape, device: Device) -> list[str]:
    """What to change where an engine would be given up while it works; empty if nothing is."""
    seconds, timeout = longest_silence(config, architecture, shape, device), config.rollout.request_timeout
    if MARGIN * seconds <= timeout:
        return []
    return [
        f"warning: a full engine may answer nothing for about {seconds:.0f} s (completions at their full length), and "
        f"rollout.request_timeout={timeout:g}, after which it is given up, is not {MARGIN:g} times that; give "
        f"{60 * math.ceil(MARGIN * seconds / 60.0)} or more, or a lower rollout.max_running_requests={config.rollout.max_running_requests}"
    ]

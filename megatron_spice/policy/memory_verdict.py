"""What follows from a memory budget: a table for people, what is in the way of a recipe, and what is tight.

A recipe is refused for what is certain: estimated parts count with `CERTAIN` of themselves. What the estimate alone says is
a warning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_spice.config.schema import Config
from megatron_spice.policy.memory_budget import ENGINE_WORKS, GIB, STATES, Budget, State

CERTAIN = 0.75
"""Share of the estimated activations that an update takes in any case."""
FULL = 0.95
"""Share of a device beyond which it is said to be tight."""


def table(made: Budget, warnings: Sequence[str] = ()) -> str:
    """For people: GiB by part and state, and what the device has left."""
    lines = [
        f"# Memory in GiB: {made.where}; {made.device.name}",
        f"{'':<32}" + "".join(f"{state:>10}" for state in STATES),
    ]
    for part in made.parts:
        if any(getattr(part, state) for state in STATES):
            name = part.name + (" (estimate)" if part.is_estimate else "")
            lines.append(f"{name:<32}" + "".join(_gib(getattr(part, state)) for state in STATES))
    lines.append(f"{'together':<32}" + "".join(_gib(made.total(state)) for state in STATES))
    lines.append(f"{'left':<32}" + "".join(_gib(made.device.num_bytes - made.total(state)) for state in STATES))
    if made.cache_tokens is not None:
        lines.append(f"an engine's KV cache holds {made.cache_tokens:,} tokens")
    if made.host:
        kept = ", ".join(f"{name} {size / GIB:.1f}" for name, size in made.host.items())
        known = f" of {made.device.host_bytes / GIB:.0f}" if made.device.host_bytes is not None else ""
        lines.append(f"host memory of a node: {sum(made.host.values()) / GIB:.1f}{known} ({kept})")
    lines += [f"warning: {words}" for words in warnings]
    return "\n".join(lines) + "\n"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:>10.2f}" if num_bytes else f"{'-':>10}"


def problems(made: Budget, config: Config) -> list[str]:
    """What keeps a recipe from running on these devices, each with the settings to change; empty if nothing does."""
    size = made.device.num_bytes
    found = [
        f"{state} takes {certain / GIB:.1f} GiB or more, and {made.device.name} has {size / GIB:.1f} GiB ({made.where}; most "
        f"of it {_largest(made, state)}); {_remedy(made, config, state)}"
        for state in STATES
        if (certain := made.total(state, CERTAIN)) > size
    ]
    return found + _engine_problems(made, config) + _host_problems(made, config)


def warnings(made: Budget, config: Config) -> list[str]:
    """What may not fit, and what to change then."""
    size, found = made.device.num_bytes, []
    for state in STATES:
        if made.total(state, CERTAIN) <= size and (likely := made.total(state)) > FULL * size:
            found.append(
                f"{state} is estimated at {likely / GIB:.1f} GiB of {size / GIB:.1f} GiB; if it does not fit, "
                f"{_remedy(made, config, state)}"
            )
    if made.cache_tokens is not None and _longest_completion(config) <= made.cache_tokens < made.longest:
        found.append(
            f"an engine's KV cache holds {made.cache_tokens} tokens and a sequence may have up to {made.longest}: an engine "
            f"refuses longer ones; raise {_cache_key(made)}"
        )
    return found


def _engine_problems(made: Budget, config: Config) -> list[str]:
    rollout = config.rollout
    if made.cache_tokens is None:
        return []
    if made.cache_tokens == 0:
        weights = made.of("engine's weights").rollout
        return [
            f"rollout.memory_fraction={rollout.memory_fraction} of the {made.engine_finds / GIB:.1f} GiB that an engine finds "
            f"free is {rollout.memory_fraction * made.engine_finds / GIB:.1f} GiB, and its weights alone take "
            f"{weights / GIB:.1f} GiB a rank; raise it, or rollout.tensor_parallel_size={rollout.tensor_parallel_size}"
        ]
    if made.cache_tokens < (longest := _longest_completion(config)):
        return [
            f"an engine's KV cache holds {made.cache_tokens} tokens, and a completion may have {longest}; raise "
            f"{_cache_key(made)}, or lower game.challenger_max_tokens and game.reasoner_max_tokens"
        ]
    return []


def _host_problems(made: Budget, config: Config) -> list[str]:
    found, device, host = [], made.device, sum(made.host.values())
    if device.host_bytes is not None and host > device.host_bytes:
        found.append(
            f"a node's ranks keep {host / GIB:.1f} GiB in host memory ({', '.join(made.host)}), and it has "
            f"{device.host_bytes / GIB:.1f} GiB; use more nodes, policy.sleep=gradients with a lower rollout.memory_fraction, "
            "or a lower policy.optimizer_offload"
        )
    buckets = made.of("buckets").syncing
    if device.shared_memory is not None and buckets > device.shared_memory:
        found.append(
            f"weights travel to the engines in {buckets / GIB:.2f} GiB of /dev/shm, which has {device.shared_memory / GIB:.2f} "
            f"GiB; lower rollout.bucket_mb={config.rollout.bucket_mb}, or give the container more (--shm-size)"
        )
    return found


def _longest_completion(config: Config) -> int:
    return max(config.game.challenger_max_tokens, config.game.reasoner_max_tokens)


def _cache_key(made: Budget) -> str:
    return "rollout.max_total_tokens" if made.device.kind == "cpu" else "rollout.memory_fraction"


def _largest(made: Budget, state: State) -> str:
    parts = sorted(made.parts, key=lambda part: -getattr(part, state))[:2]
    return " and ".join(f"{part.name} {getattr(part, state) / GIB:.1f} GiB" for part in parts)


def _remedy(made: Budget, config: Config, state: State) -> str:
    policy, rollout = config.policy, config.rollout
    if made.device.kind == "cpu":
        fewer = "use a smaller model, fewer ranks a node (cluster.ranks_per_node) or engines (rollout.engines_per_node), or "
        return fewer + f"a lower rollout.max_total_tokens={rollout.max_total_tokens}"
    if state == "rollout":
        share = math.floor(100 * (1 - ENGINE_WORKS["cuda"] / max(1, made.engine_finds))) / 100
        if 0 < share < rollout.memory_fraction:
            return f"lower rollout.memory_fraction={rollout.memory_fraction} to {share} or less"
        return f"use policy.sleep=all instead of {policy.sleep}, or more ranks"
    if state == "syncing":
        return (
            f"raise rollout.tensor_parallel_size={rollout.tensor_parallel_size} or policy.tensor_parallel_size="
            f"{policy.tensor_parallel_size}, or lower rollout.bucket_mb={rollout.bucket_mb}"
        )
    if made.of("activations").training > made.total(state) / 3:
        recompute = "" if policy.recompute == "full" else f", policy.recompute=full instead of {policy.recompute}"
        return (
            f"use a lower policy.tokens_per_microbatch={policy.tokens_per_microbatch}{recompute}, or a larger "
            f"policy.context_parallel_size={policy.context_parallel_size}"
        )
    offload = "" if policy.precision == "fp32" else ", or policy.optimizer_offload above 0"
    return (
        f"use more ranks, a larger policy.tensor_parallel_size={policy.tensor_parallel_size} or policy.pipeline_parallel_size="
        f"{policy.pipeline_parallel_size}{offload}"
    )

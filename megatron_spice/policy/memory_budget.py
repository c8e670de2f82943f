"""What a run will take of its devices' memory, computed before it starts, in the three states it goes through.

    training   the policy is awake, the engines sleep
    syncing    the policy's weights and the engines' are there together, and buckets between them
    rollout    the engines have their KV cache, the policy sleeps as deep as `policy.sleep` lets it

They follow `train.py`'s hand-overs and `memory.py`. A device is one accelerator, with the rank and the share of an engine
on it. On a CPU it is a node's memory, where all ranks and engines live at once and engines release nothing.

Weights, gradients and optimiser state are exact (tests compare them with what Megatron allocates), activations are an
estimate, and what CUDA and the processes themselves take is assumed. What follows
from it is in `memory_verdict.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_spice.config.engine_weights import BLOCK, fp8_layers
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config, PolicyConfig, Precision
from megatron_spice.policy.activations import SCALE, activations
from megatron_spice.policy.parameter_count import RankParameters, engine_layer_matrices, engine_parameters, rank_parameters

GIB = 2**30
H100_BYTES = 81559 * 2**20
"""What nvidia-smi says of an H100 with 80 GB: assumed where there is no accelerator to ask."""
BUCKETS = {"cuda": 4, "cpu": 2}
"""Buckets that exist at a time: on CUDA one gathered, one on its way and its copy, and slices; on a CPU a parcel's blocks."""

# Assumed, not measured by this house. CUDA: contexts, communication and library workspaces; what an engine computes in, of
# which captured graphs stay while it sleeps. CPU: interpreter and libraries of a rank, and of an engine's three processes,
# which share most of them (0.8 GiB measured; that they do is tested, `tests/rollout/test_engine.py`).
POLICY_CONTEXT = {"cuda": 2 * GIB, "cpu": GIB // 2}
ENGINE_CONTEXT = {"cuda": GIB // 2, "cpu": GIB}
ENGINE_WORKS = {"cuda": 2 * GIB, "cpu": GIB // 4}

Rank = tuple[list["Part"], dict[str, int]]
State = Literal["training", "syncing", "rollout"]
STATES: tuple[State, ...] = ("training", "syncing", "rollout")


@dataclass(frozen=True, slots=True)
class Device:
    """What everything is to fit in: an accelerator, or on a CPU a node's memory; its bytes, and what it is in words.

    `host_bytes`: on CUDA, memory of the node beside it. `shared_memory`: bytes of /dev/shm. None where they are not known.
    """

    kind: Literal["cuda", "cpu"]
    num_bytes: int
    name: str
    host_bytes: int | None = None
    shared_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind on a device in each state."""

    name: str
    training: int = 0
    syncing: int = 0
    rollout: int = 0
    is_estimate: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """The parts of the fullest device, which `where` names.

    `cache_tokens`: tokens that a colocated engine's KV cache holds, None without any. `longest`: of the longest sequence. On
    CUDA also `engine_finds`: bytes that are free when an engine starts, and `host`: those that one node's ranks keep in host
    memory, by name.
    """

    device: Device
    where: str
    parts: list[Part]
    cache_tokens: int | None
    longest: int
    engine_finds: int = 0
    host: dict[str, int] = field(default_factory=dict)

    def total(self, state: State, estimate: float = 1.0) -> int:
        """Bytes in a state; estimated parts count with `estimate` of themselves."""
        return round(sum(getattr(part, state) * (estimate if part.is_estimate else 1.0) for part in self.parts))

    def of(self, name: str) -> Part:
        """The part of that name; an empty one if there is none."""
        return next((part for part in self.parts if part.name == name), Part(name))


def budget(
    config: Config, architecture: ModelArchitecture, layout: ParallelLayout, device: Device, longest: int | None = None
) -> Budget:
    """The budget of a recipe on such devices.

    Args:
        longest: tokens of the longest sequence that is to be expected; None: what the context admits.
    """
    context = config.rollout.context_length or architecture.max_position_embeddings
    longest = min(longest or context, context)
    row = max(config.policy.tokens_per_microbatch, longest)
    row = -(-row // layout.row_multiple) * layout.row_multiple
    ranks = [_policy(config, architecture, layout, device, stage, row) for stage in range(layout.pipeline)]
    of_a_device = _on_a_node if device.kind == "cpu" else _on_an_accelerator
    return of_a_device(config, architecture, layout, device, ranks, longest)


def bytes_asleep(policy: PolicyConfig, numbers: RankParameters, cuda: bool) -> int:
    """What a rank copies to host memory when it goes to sleep, and back when it wakes: gradients are none of it."""
    if policy.sleep == "gradients" or (policy.sleep == "auto" and not cuda):
        return 0
    state = numbers.stepped * _state_bytes(policy.precision)
    return numbers.held * _weight_bytes(policy.precision) + state - round(state * policy.optimizer_offload)


def bytes_saved(policy: PolicyConfig, numbers: RankParameters) -> int:
    """What a rank copies to host memory for a checkpoint: of what several ranks hold each its part."""
    return numbers.stepped * (_weight_bytes(policy.precision) + _state_bytes(policy.precision))


def bytes_written(policy: PolicyConfig, numbers: RankParameters) -> int:
    """And what it writes of that: in float32, where a weight is its own master, it is in the file as both."""
    return numbers.stepped * file_bytes(policy.precision)


def file_bytes(precision: Precision) -> int:
    """Of one number of the model in a checkpoint: weight, float32 master, two moments."""
    return _weight_bytes(precision) + 12


def _state_bytes(precision: Precision) -> int:
    return 8 if precision == "fp32" else 12  # two moments, and a float32 copy of 16-bit weights


def _weight_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _policy(
    config: Config, architecture: ModelArchitecture, layout: ParallelLayout, device: Device, stage: int, row: int
) -> list[Part]:
    """What a rank of a stage takes by itself, and the host memory of an accelerator's rank under names with a star."""
    policy, cuda = config.policy, device.kind == "cuda"
    held = rank_parameters(architecture, layout, stage)
    weights, gradients = held.held * _weight_bytes(policy.precision), held.held * 4
    state = held.stepped * _state_bytes(policy.precision)
    away = round(state * policy.optimizer_offload)
    asleep = bytes_asleep(policy, held, cuda)
    at_rest = 0 if asleep and cuda else 1  # on a CPU copies lie in the same memory
    parts = [
        Part("weights", weights, weights, at_rest * weights),
        Part("gradients", gradients),
        Part("optimiser state", state - away, at_rest * (state - away), at_rest * (state - away)),
        Part("activations", activations(architecture, policy, layout, stage, row, cuda).peak, is_estimate=True),
    ]
    if policy.precision == "fp8" and cuda:
        inside = fp8_layers(policy, architecture.num_layers)
        copies = round(2 * SCALE * sum(count for layer, count in held.linear.items() if layer in inside))
        parts.append(Part("FP8 copies of weights", copies, at_rest * copies, at_rest * copies))  # by rows and by columns
    reference = 0 if policy.kl_coefficient is None else weights
    saved = bytes_saved(policy, held)
    if not cuda:
        beside = (_always("a checkpoint being written", saved), _always("reference weights", reference))
        return [*parts, *beside, _always("ranks' processes", POLICY_CONTEXT["cpu"])], {}
    host = {
        "copies of what sleeps": asleep,
        "a checkpoint being written": saved,
        "reference weights": reference,
        "offloaded optimiser": away * 16 // 12,  # and gradients for it
    }
    return [*parts, _always("policy's CUDA context", POLICY_CONTEXT["cuda"])], host


def _on_an_accelerator(
    config: Config, architecture: ModelArchitecture, layout: ParallelLayout, device: Device, ranks: list[Rank], longest: int
) -> Budget:
    rollout, per_node = config.rollout, config.cluster.ranks_per_node
    fullest = max(range(len(ranks)), key=lambda stage: sum(part.training for part in ranks[stage][0]))
    parts = list(ranks[fullest][0])
    resting = sum(part.rollout for part in parts)
    weights, a_token = engine_weights(config, architecture, on_cuda=True), _token_bytes(config, architecture)
    free = device.num_bytes - resting - ENGINE_CONTEXT["cuda"]
    cache = max(0, int(rollout.memory_fraction * free) - weights)  # SGLang takes its share of what it finds free
    parts.append(Part("buckets", 0, BUCKETS["cuda"] * _bucket(config, architecture)))
    if not rollout.engines:
        parts += [
            Part("engine's weights", 0, weights, weights),
            Part("engine's KV cache", 0, 0, cache),
            _always("engine's CUDA context, graphs", ENGINE_CONTEXT["cuda"] + ENGINE_WORKS["cuda"]),
        ]
    host: dict[str, int] = {}
    for rank in range(per_node):
        for name, size in ranks[rank * layout.pipeline // layout.world_size][1].items():
            host[name] = host.get(name, 0) + size
    stage = f", pipeline stage {fullest}" if layout.pipeline > 1 else ""
    kept = {name: size for name, size in host.items() if size}
    tokens = None if rollout.engines else cache // a_token
    return Budget(device, f"a rank{stage}", parts, tokens, longest, free, kept)


def _on_a_node(
    config: Config, architecture: ModelArchitecture, layout: ParallelLayout, device: Device, ranks: list[Rank], longest: int
) -> Budget:
    rollout, per_node = config.rollout, config.cluster.ranks_per_node
    nodes = []
    for first in range(0, layout.world_size, per_node):
        sums: dict[str, Part] = {}
        for rank in range(first, min(first + per_node, layout.world_size)):
            for part in ranks[rank * layout.pipeline // layout.world_size][0]:
                sums[part.name] = _plus(sums.get(part.name), part)
        nodes.append(list(sums.values()))
    fullest = max(range(len(nodes)), key=lambda node: sum(part.training for part in nodes[node]))
    engines, shards = 0 if rollout.engines else rollout.engines_per_node, rollout.tensor_parallel_size
    buckets = engines * BUCKETS["cpu"] * _bucket(config, architecture)
    if config.game.fixed_challenger and not rollout.challenger.engines:  # beside each engine, wherever that is, a second
        engines += engines or -(-len(rollout.engines) * per_node // layout.world_size)
    works = engines * (ENGINE_CONTEXT["cpu"] + ENGINE_WORKS["cpu"])
    parts = nodes[fullest] + [
        _always("engines' weights", engines * shards * engine_weights(config, architecture, on_cuda=False)),
        _always("engines' KV caches", engines * shards * rollout.max_total_tokens * _token_bytes(config, architecture)),
        _always("buckets", buckets),
        _always("engines' processes", works),
    ]
    which = f"node {fullest}" if len(nodes) > 1 else "a node"
    tokens = rollout.max_total_tokens if engines else None
    return Budget(device, f"{which}: {per_node} ranks, {engines} engine(s)", parts, tokens, longest)


def engine_weights(config: Config, architecture: ModelArchitecture, on_cuda: bool) -> int:
    """Bytes on each of a colocated engine's ranks: those of an FP8 policy keep bf16 unless `rollout.weights=fp8`, and on a CPU
    even then, beside the FP8 ones."""
    ranks = config.rollout.tensor_parallel_size
    layers = fp8_layers(config.policy, architecture.num_layers) if config.rollout.weights == "fp8" else range(0)
    small = len(layers) * engine_layer_matrices(architecture, ranks)
    wide = engine_parameters(architecture, ranks) - (small if on_cuda else 0)
    return wide * _width(config) + round(small * (1 + 4 / BLOCK**2))


def _token_bytes(config: Config, architecture: ModelArchitecture) -> int:
    """Bytes of one token in the KV cache of one of an engine's ranks."""
    groups = max(1, architecture.num_query_groups // config.rollout.tensor_parallel_size)
    return 2 * architecture.num_layers * groups * architecture.head_dim * _width(config)


def _bucket(config: Config, architecture: ModelArchitecture) -> int:
    """Bytes of the largest bucket: as many as configured and an eighth more (`weights/plan.py`), but a tensor travels whole and
    a small model in one."""
    largest = architecture.vocab_size * architecture.hidden_size * _width(config)
    return max(largest, min(config.rollout.bucket_mb * 2**20 * 9 // 8, engine_parameters(architecture, 1) * _width(config)))


def _width(config: Config) -> int:
    return _weight_bytes(config.policy.precision)


def _always(name: str, num_bytes: int) -> Part:
    return Part(name, num_bytes, num_bytes, num_bytes)


def _plus(left: Part | None, right: Part) -> Part:
    if left is None:
        return right
    return replace(left, **{state: getattr(left, state) + getattr(right, state) for state in STATES})

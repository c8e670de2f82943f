"""Expected seconds of an iteration by phase, tokens a second, and weak scaling to many nodes, as `plan` prints them.

    sync     the hand-over, on CUDA what the policy moves to the host, the weights' bytes at the copy rate, check of both sides
    play     the busiest engine's work (play.py), and that of half a passage more where several engines wait for the last one
    wake     the hand-over back, and what the policy had moved to the host
    train    the busiest rank's update (update.py)
    save     copying what a rank saves, shared out over the iterations between two saves; writing goes on beside
    other    episodes that every rank reads, barriers that grow with the logarithm of the ranks
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config
from megatron_spice.cost.device import Device, Work, scaled
from megatron_spice.cost.engines import engine_shape, silence_warnings
from megatron_spice.cost.play import EngineShape, play_work
from megatron_spice.cost.update import update_work
from megatron_spice.cost.workload import Workload
from megatron_spice.policy.memory_budget import H100_BYTES, bytes_asleep, bytes_saved, bytes_written
from megatron_spice.policy.packing import Cost, plan_rows
from megatron_spice.policy.parameter_count import engine_parameters, rank_parameters

MOST_RANKS = 1024
EPISODE_BYTES = 12.0  # of a token in what ranks exchange: id and log-probability
HAND_OVERS, BARRIERS = 1.0, 8.0  # of an iteration
SHORTEST_WARNING = 180  # seconds
HEARD = 2.0  # seconds in which all ranks have heard that they are asked to end; they look every half a second


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by phase, and the tokens trained on."""

    ranks: int
    phases: dict[str, float]
    tokens: float

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def estimate(
    config: Config, architecture: ModelArchitecture, num_nodes: int, device: Device, cores: int = 1, workload: Workload | None = None,
    memory: int = H100_BYTES,
) -> Estimate:  # fmt: skip
    """An iteration on so many nodes.

    Args:
        cores: of a node, where the device is a CPU.
        memory: bytes of the accelerator, where the device is one; engines have their KV caches in what the rest leaves of it.
    """
    ranks = num_nodes * config.cluster.ranks_per_node
    layout = ParallelLayout.of(config.policy, architecture, ranks)
    load = workload or Workload.of(config)
    engines = len(config.rollout.engines) or num_nodes * config.rollout.engines_per_node
    threads = max(1, cores // config.cluster.ranks_per_node) if device.on_cpu else 1
    moved = most_bytes(bytes_asleep, config, architecture, layout, not device.on_cpu)
    shape = engine_shape(config, architecture, layout, device, memory)
    return Estimate(ranks, {
        "sync": device.seconds(sync_work(config, architecture, moved)),
        "play": _play_seconds(config, architecture, load, engines, shape, device),
        "wake": device.seconds({"hand_over": HAND_OVERS, "save_copy": moved}),
        "train": device.seconds(train_work(config, architecture, layout, load, device), threads),
        "save": device.seconds(save_work(most_bytes(bytes_saved, config, architecture, layout))) / config.checkpoint.every,
        "other": device.seconds(_other_work(load, ranks)),
    }, load.trained_tokens())  # fmt: skip


def most_bytes(
    count: Callable[..., int], config: Config, architecture: ModelArchitecture, layout: ParallelLayout, *more: bool
) -> float:
    """What the rank has that has most, by `bytes_asleep`, `bytes_saved` or `bytes_written`."""
    stages = (rank_parameters(architecture, layout, stage) for stage in range(layout.pipeline))
    return float(max(count(config.policy, numbers, *more) for numbers in stages))


def warning_seconds(config: Config, architecture: ModelArchitecture, num_nodes: int, device: Device, cores: int = 1) -> int:
    """How long before its time limit a job wants to be told, in whole minutes."""
    return max(SHORTEST_WARNING, 60 * math.ceil(ending_seconds(config, architecture, num_nodes, device, cores)[1] / 60.0))


def ending_seconds(
    config: Config, architecture: ModelArchitecture, num_nodes: int, device: Device, cores: int = 1
) -> tuple[float, float]:
    """How long a job takes to be saved when it is asked to end: while it plays, when passages are given up and what sleeps is written
    from where it is; and at most, when the longest phase is finished before, and a save that is under way is waited for."""
    layout = ParallelLayout.of(config.policy, architecture, num_nodes * config.cluster.ranks_per_node)
    phases = estimate(config, architecture, num_nodes, device, cores).phases
    longest = max(seconds for name, seconds in phases.items() if name != "play")
    copied, written = (most_bytes(count, config, architecture, layout) for count in (bytes_saved, bytes_written))
    write, saves = device.seconds({"save_write": written}), device.seconds(save_work(copied) | {"save_write": 2.0 * written})
    return HEARD + write, HEARD + longest + phases["wake"] + saves


def sync_work(config: Config, architecture: ModelArchitecture, moved: float) -> Work:
    """The weights' way to the engines, from the policy's going to sleep, for which `moved` bytes go to the host, to the check."""
    size = 4.0 if config.policy.precision == "fp32" else 1.0 if config.rollout.weights == "fp8" else 2.0
    return {
        "copy": size * engine_parameters(architecture, 1), "push": 1.0, "hand_over": HAND_OVERS, "check": float(config.rollout.verify_sync),
        "save_copy": moved,
    }  # fmt: skip


def train_work(config: Config, architecture: ModelArchitecture, layout: ParallelLayout, load: Workload, device: Device) -> Work:
    """All optimiser steps of an iteration."""
    passages = max(1, math.ceil(load.passages / layout.data / config.train.optimizer_steps))
    trajectories = load.trajectories(passages)
    multiple = layout.pipeline if layout.virtual > 1 else 1
    policy = config.policy
    [rows] = plan_rows(
        trajectories, policy.tokens_per_microbatch, 1, policy.shared_prefix, Cost.of(architecture), multiple
    )  # fmt: skip
    step = update_work(architecture, policy, layout, rows, config.cluster.ranks_per_node)
    return scaled(step, float(config.train.optimizer_steps))


def save_work(num_bytes: float) -> Work:
    """What an iteration waits for when a rank's state of so many bytes is saved."""
    return {"save": 1.0, "save_copy": num_bytes}


def _play_seconds(
    config: Config, architecture: ModelArchitecture, load: Workload, engines: int, shape: EngineShape, device: Device
) -> float:
    share = max(1.0, load.passages / engines)
    batches = load.batches(share, config.rollout.passages_in_flight)
    more = (1.0 - 1.0 / engines) / 2.0  # passages
    return device.seconds(play_work(architecture, shape, batches)) * (1.0 + more / share)


def _other_work(load: Workload, ranks: int) -> Work:
    return {"exchange": load.trained_tokens() * EPISODE_BYTES if ranks > 1 else 0.0, "barrier": BARRIERS * math.log2(max(1, ranks))}


def scaling(
    config: Config, architecture: ModelArchitecture, num_nodes: int, device: Device, cores: int = 1, memory: int = H100_BYTES
) -> list[Estimate]:
    """The same recipe with more nodes and as many more passages, up to 1,024 ranks."""
    found, times = [], 1
    load = Workload.of(config)
    while times == 1 or num_nodes * times * config.cluster.ranks_per_node <= MOST_RANKS:
        more = replace(load, passages=load.passages * times)
        found.append(estimate(config, architecture, num_nodes * times, device, cores, more, memory))
        times *= 2
    return found


def table(
    config: Config, architecture: ModelArchitecture, num_nodes: int, device: Device, cores: int = 1, memory: int = H100_BYTES
) -> str:
    """What `plan` prints."""
    rows = scaling(config, architecture, num_nodes, device, cores, memory)
    first = rows[0]
    names = list(first.phases)
    lines = [
        f"# Expected time of an iteration on {device.name}: {first.seconds:.1f} s, {first.tokens / first.seconds:.0f} tokens/s trained on",
        Workload.of(config).describe(),
        "nodes  ranks  passages  " + "  ".join(f"{name:>7}" for name in names) + "  seconds   tokens/s  efficiency",
    ]
    for place, row in enumerate(rows):
        nodes = row.ranks // config.cluster.ranks_per_node
        phases = "  ".join(f"{row.phases[name]:7.2f}" for name in names)
        lines.append(
            f"{nodes:>5}  {row.ranks:>5}  {config.train.passages * 2**place:>8}  {phases}  {row.seconds:7.1f}  {row.tokens / row.seconds:9.0f}  "
            f"{first.seconds / row.seconds:10.2f}"
        )
    known = {True: [], False: []}
    for name, constant in device.constants.items():
        known[constant.measured].append(name)
    lines.append("(with the nodes, passages grow: weak scaling, modelled)")
    lines.append(f"constants measured: {', '.join(known[True]) or 'none'}")
    lines.append(f"constants assumed or published: {', '.join(known[False]) or 'none'}")
    layout = ParallelLayout.of(config.policy, architecture, first.ranks)
    lines += silence_warnings(config, architecture, engine_shape(config, architecture, layout, device, memory), device)
    return "\n".join(lines) + "\n"

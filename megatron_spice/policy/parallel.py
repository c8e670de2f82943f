"""Megatron's process groups for a layout, and where this rank stands in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.placement import hosted_engine, remote_engines
from megatron_spice.weights.routes import Seat


@dataclass(frozen=True, slots=True)
class Placement:
    """Where this rank stands in the layout. The last stage holds the model's last chunk of layers."""

    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    expert_rank: int
    data_rank: int
    is_first_stage: bool
    is_last_stage: bool


def initialize(layout: ParallelLayout, seed: int, timeout: float) -> Placement:
    """Creates Megatron's process groups and seeds its random states, after the world group exists. Groups of the same
    degrees that are there already are used again.

    Experts are spread over the ranks of a stage, never cut: their tensor-parallel size is 1.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        assert _degrees() == (layout.tensor, layout.pipeline, layout.context, layout.expert), "groups of another layout"
        parallel_state.set_virtual_pipeline_model_parallel_world_size(layout.virtual if layout.virtual > 1 else None)
    else:
        _create_groups(layout, timeout)
    model_parallel_cuda_manual_seed(seed)
    return Placement(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )


def _create_groups(layout: ParallelLayout, timeout: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, math.ceil(timeout / 60)),
    )


def _degrees() -> tuple[int, int, int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def seats(topology: Topology, placement: Placement, rollout: RolloutConfig) -> list[Seat]:
    """Where every rank stands, and which host engines, or send to ones that run already. All ranks call it together, after `initialize`."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    team = tuple(dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()))
    if rollout.engines:
        is_host = bool(remote_engines(topology.rank, topology.world_size, rollout.engines))
    else:
        is_host = hosted_engine(topology.local_rank, topology.local_world_size, rollout.engines_per_node) is not None
    mine = Seat(topology.rank, topology.node_rank, placement.pipeline_rank, placement.expert_rank, team, is_host)
    everyone: list[Seat] = [mine] * topology.world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def shutdown() -> None:
    """Destroys Megatron's groups. Megatron itself only forgets them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)

"""How the ranks are divided: one object that owns the parallel degrees, checks them, and sets up Megatron's groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_spice.config.schema import PolicyConfig


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Degrees of parallelism; `data` is what is left of the world after tensor and pipeline."""

    tensor: int
    pipeline: int
    data: int

    @classmethod
    def of(cls, config: PolicyConfig, world_size: int) -> ParallelLayout:
        """The layout of a recipe on `world_size` ranks (`config/checks.py` has judged it against the model).

        Raises:
            ValueError: the ranks are not divisible by the model's degrees.
        """
        tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
        if world_size % (tensor * pipeline):
            raise ValueError(
                f"{world_size} ranks are not divisible by policy.tensor_parallel_size={tensor} x "
                f"policy.pipeline_parallel_size={pipeline}; change cluster.ranks_per_node or one of these"
            )
        return cls(tensor, pipeline, world_size // (tensor * pipeline))

    def describe(self) -> str:
        """For people: `TP=2 PP=4 DP=8`."""
        return f"TP={self.tensor} PP={self.pipeline} DP={self.data}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where this rank stands in the layout."""

    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    is_first_stage: bool
    is_last_stage: bool


def initialize(layout: ParallelLayout, seed: int, timeout: float) -> Placement:
    """Creates Megatron's process groups and seeds its random states. Call once, after the world group exists."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        distributed_timeout_minutes=max(1, math.ceil(timeout / 60)),
    )
    model_parallel_cuda_manual_seed(seed)
    return Placement(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )


def shutdown() -> None:
    """Destroys Megatron's groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()

"""The policy: the model being trained, its optimiser, and what the driver may ask of them.

All ranks call every method together. Trajectories are the same list on every rank; each works on its own share of rows.
Rows without any advantage are left out: their gradient is exactly zero, while they still count in the loss's
denominator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import Config
from megatron_spice.game.records import Trajectory
from megatron_spice.policy import parallel
from megatron_spice.policy.loss import LossSettings, row_loss
from megatron_spice.policy.metrics import StepMetrics, UpdateMetrics
from megatron_spice.policy.model import build_model
from megatron_spice.policy.optimizer import SHARDING, build_optimizer, load_optimizer_state, wrap
from megatron_spice.policy.packing import Row, plan_rows, split_steps
from megatron_spice.policy.rows import RowTensors, row_tensors
from megatron_spice.weights.gather import Gatherer
from megatron_spice.weights.load import load_hf
from megatron_spice.weights.stage import Stage


class Policy:
    """One rank's part of the policy: token ids in, log-probabilities and updated weights out."""

    def __init__(self, config: Config, architecture: ModelArchitecture, topology: Topology) -> None:
        """Builds the model and optimiser with weights not yet loaded.

        Raises:
            ValueError: the layout does not fit the ranks.
        """
        self.config = config.policy
        self.architecture = architecture
        self.device = torch.device("cpu") if topology.device == "cpu" else torch.device("cuda", topology.local_rank)
        self.layout = parallel.ParallelLayout.of(config.policy, topology.world_size)
        self.placement = parallel.initialize(self.layout, config.train.seed, config.cluster.timeout)
        self.optimizer_steps = config.train.optimizer_steps
        self.loss_length = config.policy.loss_length or max(
            config.game.challenger_max_tokens, config.game.reasoner_max_tokens
        )
        self.model = build_model(
            architecture, config.policy, self.layout, self.placement, config.rollout.temperature
        ).to(self.device)
        self.wrapped = wrap(self.model)
        self.optimizer = build_optimizer(self.wrapped, config.policy)
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()
        self.stage = Stage(self.placement.pipeline_rank, self.layout.pipeline, architecture.num_layers)
        self.gatherer = Gatherer(
            architecture,
            self.stage,
            config.rollout.bucket_mb * 2**20 // self.parameters_dtype.itemsize,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        self.awake = True

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def parameters_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def load_hf(self, folder: Path) -> None:
        """Weights from a Hugging Face folder. Raises ValueError when its tensors do not fit the architecture."""
        place = self.placement
        load_hf(
            dict(self.model.named_parameters()), folder, self.architecture, self.stage, place.tensor_rank,
            self.layout.tensor,
        )  # fmt: skip
        self.optimizer.reload_model_params()

    def hf_buckets(self) -> Iterator[dict[str, torch.Tensor]]:
        """The current weights as whole Hugging Face tensors, bucket by bucket (see `weights/gather.py`)."""
        return self.gatherer.buckets(dict(self.model.named_parameters()))

    @property
    def hf_names(self) -> set[str]:
        """The names of all tensors that `hf_buckets` gives."""
        return {name for bucket in self.gatherer.plan for name in bucket.shapes}

    def model_state(self) -> dict[str, Any]:
        """Megatron's sharded description of the weights, for saving and for loading."""
        return self.model.sharded_state_dict()

    def optimizer_state(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """Megatron's sharded description of the optimiser."""
        return self.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=SHARDING)

    def load_state(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None:
        """Takes over what a checkpoint gave back for the two descriptions above."""
        self.model.load_state_dict(model_state)
        if optimizer_state is None:
            self.optimizer.reload_model_params()
        else:
            load_optimizer_state(self.optimizer, optimizer_state, self.config)

    # -- sharing the accelerator ----------------------------------------------------------------------------------

    def sleep(self) -> None:
        """The engines are about to use the accelerator; cached memory goes back to it."""
        assert self.awake, "the policy is already asleep"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.awake = False

    def wake(self) -> None:
        """The engines are asleep; the policy may compute."""
        assert not self.awake, "the policy is already awake"
        self.awake = True

    # -- computing ------------------------------------------------------------------------------------------------

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One iteration's optimiser steps. Returns metrics, equal on every rank.

        A step in which no trajectory has an advantage is skipped: there is nothing to learn from, and an optimiser with
        momentum would move all the same.
        """
        assert self.awake, "update() on a sleeping policy"
        parts = split_steps(trajectories, self.optimizer_steps)
        plans = [self._plan(part) for part in parts]
        several = len([plan for plan in plans if plan]) > 1
        metrics = UpdateMetrics(len(trajectories))
        shares = [[row_tensors(row, self.device) for row in plan] for plan in plans]
        if several:
            for rows in shares:
                for row, result in zip(rows, self._run(rows, forward_only=True)):
                    row.old_logprobs_c = result["logprobs"]
        settings = LossSettings(self.config.clip_ratio if several else None, self.config.importance_cap)
        for plan, rows in zip(plans, shares):
            if rows:
                metrics.add(self._step(rows, settings), plan)
        if not any(plans) and trajectories:
            # Nothing to learn from, but the drift between engine and policy is watched in every iteration.
            metrics.watch(self._watch(trajectories, settings))
        return metrics.summary()

    def _watch(self, trajectories: Sequence[Trajectory], settings: LossSettings) -> StepMetrics:
        """One row's worth of trajectories through the model, without learning from them."""
        seen = [trajectory for trajectory in trajectories if trajectory.completion_ids]
        [rows, *_] = plan_rows(seen, self.config.tokens_per_microbatch, 1)
        results = self._run([row_tensors(row, self.device) for row in rows[:1]], forward_only=True, settings=settings)
        return StepMetrics(results if self.placement.data_rank == 0 else [], 0.0)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of `token_ids[1:]`, each given the ids before it, at temperature 1."""
        rest = tuple(token_ids[1:])
        probe = Trajectory("reasoner", tuple(token_ids[:1]), rest, (0.0,) * len(rest), advantage=0.0, reward=0.0)
        [row] = plan_rows([probe], len(token_ids), 1)[0]
        sampling_temperature, self.model.temperature = self.model.temperature, 1.0
        results = self._run([row_tensors(row, self.device)], forward_only=True)
        self.model.temperature = sampling_temperature
        mine = results[0]["logprobs"].tolist() if results else None
        everyone: list[list[float] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return next(scores for scores in everyone if scores is not None)

    def _plan(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        """This rank's rows of one step, each trajectory with its factor 1 / (M L_max) in the loss."""
        scale = 1.0 / (max(1, len(trajectories)) * self.loss_length)
        active = [replace(t, weight=t.weight * scale) for t in trajectories if t.advantage and t.completion_ids]
        plan = plan_rows(
            active, self.config.tokens_per_microbatch, self.layout.data, shared_prefix=self.config.shared_prefix
        )
        return plan[self.placement.data_rank]

    def _step(self, rows: Sequence[RowTensors], settings: LossSettings) -> StepMetrics:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(rows, forward_only=False, settings=settings)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            # The weights are spoilt, but neither saved nor sent: this ends the run before either.
            raise RuntimeError(
                f"the gradient norm is {grad_norm}; start again from the newest checkpoint with a lower "
                "policy.learning_rate"
            )
        return StepMetrics(results, float(grad_norm))

    def _run(
        self, rows: Sequence[RowTensors], forward_only: bool, settings: LossSettings | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Runs Megatron's pipeline schedule over the rows; results row by row on the last stage, none elsewhere."""
        if not rows:
            return []
        # The schedule divides by the number of micro-batches and the wrapper by that of data-parallel ranks; our loss
        # is already a share of the global one.
        undo = len(rows) * self.layout.data

        def forward_step(data: Iterator[RowTensors], model: Any) -> tuple[Any, Any]:
            row = next(data)

            def finish(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                logprobs_c, entropy_c = output
                if settings is None:
                    return logprobs_c.sum() * 0.0, {"logprobs": logprobs_c.detach()}
                loss, tensors = row_loss(logprobs_c, entropy_c, row, settings)
                return loss * undo, {"loss": loss.detach(), **tensors}

            return model(row), finish

        self.wrapped.train(not forward_only)
        with torch.set_grad_enabled(not forward_only):
            return self.schedule(
                forward_step_func=forward_step,
                data_iterator=iter(rows),
                model=[self.wrapped],
                num_microbatches=len(rows),
                seq_length=max(row.ids_s.numel() for row in rows),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def close(self) -> None:
        """Destroys Megatron's process groups."""
        parallel.shutdown()

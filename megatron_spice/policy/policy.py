"""The policy: the model being trained, its optimiser, and what the driver may ask of them.

All ranks call every method together. Trajectories are the same list on every rank; each works on its own share of rows.
Rows without any advantage are left out: their gradient is exactly zero, while they still count in the loss's
denominator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_spice.checkpoint.pieces import Holdings
from megatron_spice.cluster.distributed import collective_timeout
from megatron_spice.cluster.topology import Topology
from megatron_spice.cluster.whereabouts import moved
from megatron_spice.config.engine_weights import fp8_layers
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config
from megatron_spice.game.records import Trajectory
from megatron_spice.policy import fused, parallel, precision
from megatron_spice.policy.holdings import holdings_of
from megatron_spice.policy.loss import LossSettings, row_loss
from megatron_spice.policy.memory import Sleeper
from megatron_spice.policy.metrics import StepMetrics, UpdateMetrics
from megatron_spice.policy.model import build_chunks
from megatron_spice.policy.model_config import Backend
from megatron_spice.policy.optimizer import SHARDING, build_optimizer, load_optimizer_state, wrap
from megatron_spice.policy.packing import Block, Cost, Row, num_tokens, plan_rows, split_steps
from megatron_spice.policy.reference import Reference
from megatron_spice.policy.row_mask import forget_rows
from megatron_spice.policy.rows import RowTensors, padded_length, row_tensors
from megatron_spice.weights.gather import Gatherer, Memory
from megatron_spice.weights.load import load_parameters
from megatron_spice.weights.plan import lay_out, quantised_names
from megatron_spice.weights.stage import Stage, stage_parameters


class Policy:
    """One rank's part of the policy: token ids in, log-probabilities and updated weights out."""

    def __init__(
        self, config: Config, architecture: ModelArchitecture, topology: Topology, backend: Backend | None = None
    ) -> None:
        """Builds the model and optimiser with weights not yet loaded.

        Args:
            backend: what the layers are made of; None: what this device has.

        Raises:
            ConfigError: the layout does not fit the ranks or the model, or this machine lacks what the precision needs.
        """
        self.policy_config = config.policy
        self.architecture = architecture
        self.device = torch.device("cpu") if topology.device == "cpu" else torch.device("cuda", topology.local_rank)
        self.layout = ParallelLayout.of(config.policy, architecture, topology.world_size)
        self.backend = backend or Backend.of(self.device)
        precision.check_available(config.policy, architecture, self.device)
        self.placement = parallel.initialize(self.layout, config.train.seed, collective_timeout(config.cluster.timeout))
        self.optimizer_steps = config.train.optimizer_steps
        self.loss_length = config.policy.loss_length or max(
            config.game.challenger_max_tokens, config.game.reasoner_max_tokens
        )
        self.cost = Cost.of(architecture)
        self.pad_tokens_to = math.lcm(self.layout.row_multiple, precision.token_multiple(config.policy, self.backend.uses_te))
        self.chunks = [
            chunk.to(self.device)
            for chunk in build_chunks(
                architecture, config.policy, self.layout, self.placement, config.rollout.temperature, self.backend
            )
        ]
        self.wrapped = wrap(self.chunks, config.policy)
        self.optimizer = build_optimizer(self.wrapped, config.policy)
        self.chunks[0].config.grad_scale_func = self.optimizer.scale_loss
        emulated = not self.backend.uses_te
        precision.assert_recipe_reached(self.chunks[0].config, self.optimizer.config, config.policy, emulated)
        self.schedule = get_forward_backward_func()
        self.stage = Stage(
            self.placement.pipeline_rank, self.layout, self.placement.expert_rank, architecture.num_experts
        )
        self.gatherer = Gatherer(
            architecture,
            self.stage,
            config.rollout.bucket_mb * 2**20 // self.parameters_dtype.itemsize,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
            parallel.seats(topology, self.placement, config.rollout),
        )
        quantises = config.rollout.weights == "fp8"
        self.quantised_weights = (
            quantised_names(architecture, fp8_layers(config.policy, architecture.num_layers)) if quantises else frozenset()
        )
        rounds = config.rollout.round_weights and not quantises
        self.rounded_weights = precision.rounded_weights(self.chunks, config.policy) if rounds else {}
        self.sleeper = Sleeper(self.wrapped, self.optimizer, self.device, config.policy.sleep)
        self.reference: Reference | None = None
        self._put_away: Holdings | None = None  # what was to be saved as sleep began

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def parameters_dtype(self) -> torch.dtype:
        return precision.DTYPES[self.policy_config.precision]

    @property
    def parameters(self) -> dict[tuple[int, str], torch.nn.Parameter]:
        """This rank's parameters by chunk and name."""
        return stage_parameters(self.chunks)

    def load_hf(self, folder: Path) -> None:
        """Weights from a Hugging Face folder. Raises ValueError when its tensors do not fit the architecture."""
        place = self.placement
        load_parameters(self.parameters, folder, self.architecture, self.stage, place.tensor_rank, self.layout.tensor)
        self.optimizer.reload_model_params()

    def rollout_buckets(self, memory: Memory | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """What engines are to generate with: the current weights as whole Hugging Face tensors, bucket by bucket
        (`weights/gather.py`), on ranks that host an engine; all must iterate. Each weight is as this policy's own products see
        it. An FP8 policy rounds its weights, and engines that did not would sample from another one: they get rounded weights
        (`rollout.round_weights`), or FP8 numbers and factors (`rollout.weights`).

        Args:
            memory: where on this host buckets are put, if the policy is on a CPU.
        """
        assert self.sleeper.weights_awake, "rollout_buckets() while the weights are asleep"
        on_host = memory if self.device.type == "cpu" else None
        return self.gatherer.buckets(self.parameters, self.rounded_weights, on_host, self.quantised_weights, hosts_only=True)

    @property
    def rollout_names(self) -> set[str]:
        """The names of all tensors that `rollout_buckets` gives."""
        plan, quantised = self.gatherer.plan, self.quantised_weights
        return {name for bucket in plan for name in lay_out(bucket.shapes, self.parameters_dtype, quantised)}

    def keep_reference(self) -> None:
        """From now on updates are compared with the weights as they are at this moment (`policy.kl_coefficient`)."""
        self.reference = Reference(self.sleeper.weight_buffers())

    def holdings(self, with_optimizer: bool) -> Holdings:
        """What this rank saves of the weights, and of the optimiser if wanted, over the memory that they are in: what sleeps is in
        host memory, and is saved from there."""
        if self._put_away is None:
            return holdings_of(self.model_state(), self.optimizer, with_optimizer)
        assert with_optimizer, "holdings() of a sleeping policy are of all that it has"
        pieces = [replace(piece, tensor=self.sleeper.lying(piece.tensor)) for piece in self._put_away.pieces]
        return replace(self._put_away, pieces=pieces)

    def model_state(self) -> dict[str, Any]:
        """Megatron's sharded description of the weights."""
        return {f"chunk{index}": chunk.sharded_state_dict() for index, chunk in enumerate(self.chunks)}

    def optimizer_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Megatron's sharded description of the optimiser, to load into."""
        return self.optimizer.sharded_state_dict(model_state, is_loading=True, metadata=SHARDING)

    def load_state(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None:
        """Takes over what a checkpoint gave back for the two descriptions above."""
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(model_state[f"chunk{index}"])
        if optimizer_state is None:
            self.optimizer.reload_model_params()
        else:
            load_optimizer_state(self.optimizer, optimizer_state, self.policy_config)

    # -- sharing the accelerator ----------------------------------------------------------------------------------

    def sleep(self, keep_weights: bool = True) -> dict[str, float]:
        """Gives memory up to the engines; the weights can stay until they have been sent. Returns metrics."""
        forget_rows()
        if self.sleeper.level == "all":
            # Described now: tensors without a storage cannot be cut into blocks.
            self._put_away = self.holdings(with_optimizer=True)
        return self.sleeper.sleep(keep_weights)

    def sleep_weights(self) -> dict[str, float]:
        """Gives up what `sleep` kept."""
        return self.sleeper.sleep_weights()

    @property
    def is_awake(self) -> bool:
        """Whether it may compute."""
        return self.sleeper.awake

    @property
    def weights_awake(self) -> bool:
        """Whether its weights take up memory of the device."""
        return self.sleeper.weights_awake

    def wake(self) -> dict[str, float]:
        """Takes everything back, bit for bit: the engines are asleep, the policy may compute."""
        metrics = self.sleeper.wake()
        self._put_away = None
        return metrics

    # -- what a reader of the log wants to know -------------------------------------------------------------------

    def describe(self) -> str:
        """Layout, precision, fused parts and how memory is given up, on one line."""
        parts = fused.describe(self.device.type, self.backend.uses_te)
        return "; ".join((self.layout.describe(), self.policy_config.precision, parts, f"sleep: {self.sleeper.describe()}"))

    def audit_lines(self) -> list[str]:
        """What of this rank's layers ran in FP8, and what did not and why."""
        return precision.audit_lines(precision.audit(self.chunks, self.policy_config))

    # -- computing ------------------------------------------------------------------------------------------------

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One iteration's optimiser steps. Returns metrics, equal on every rank.

        A step in which no trajectory has an advantage is skipped: there is nothing to learn from, and an optimiser with
        momentum would move all the same.
        """
        assert self.sleeper.awake, "update() on a sleeping policy"
        parts = split_steps(trajectories, self.optimizer_steps)
        several = sum(any(map(self._counts, part)) for part in parts) > 1
        settings = LossSettings.of(self.policy_config, several)
        plans = [self._plan(part) for part in parts]
        mine = [plan[self.placement.data_rank] for plan in plans]
        shares = [self._tensors(plan) for plan in plans]
        metrics = UpdateMetrics(len(trajectories), self.placement)
        if self.reference is not None:
            with self.reference.in_place():
                self._note_logprobs(shares, "reference_logprobs_c")
        if several:
            self._note_logprobs(shares, "old_logprobs_c")
        for rows, tensors in zip(mine, shares):
            if tensors:
                metrics.add(self._step(tensors, settings), rows)
        if not any(shares) and trajectories:
            # Nothing to learn from, but the drift between engine and policy is watched in every iteration.
            metrics.watch(self._watch(trajectories, settings))
        return metrics.summary()

    def fit(self, trajectories: Sequence[Trajectory], learning_rate: float | None = None) -> float:
        """One optimiser step on next-token cross entropy, the mean over all completion tokens at temperature 1, and returns it as it
        was before the step. Advantages, recorded log-probabilities and the loss's switches have no part in it; a role whose
        `policy.role_weights` is 0 is left out.

        Args:
            learning_rate: of this step; None: the recipe's.
        """
        assert self.sleeper.awake, "fit() on a sleeping policy"
        # With advantage 1 and nothing clipped the gradient of the DrGRPO loss is that of the summed log-probabilities, over
        # M L_max. Against recorded log-probabilities of 0, the drift is the cross entropy.
        told = [replace(t, advantage=1.0, logprobs=(0.0,) * len(t.completion_ids), num_stale=0) for t in trajectories]
        told = [t for t in told if self._counts(t)]
        if not told:
            return 0.0
        factor = len(told) * self.loss_length / sum(len(t.completion_ids) for t in told)
        plan = self._plan([replace(t, weight=factor) for t in told])
        metrics = UpdateMetrics(len(told), self.placement)
        with self._at_temperature(1.0), self._at_learning_rate(learning_rate or self.policy_config.learning_rate):
            metrics.add(self._step(self._tensors(plan), LossSettings(None, None)), plan[self.placement.data_rank])
        return metrics.summary()["drift/mean"]

    @contextmanager
    def _at_learning_rate(self, learning_rate: float) -> Iterator[None]:
        groups = self.optimizer.param_groups
        usual = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = learning_rate
        try:
            yield
        finally:
            for group, rate in zip(groups, usual):
                group["lr"] = rate

    def _note_logprobs(self, shares: Sequence[Sequence[RowTensors]], field: str) -> None:
        """Writes the rows' log-probabilities under the weights of this moment into the rows, on the last stage."""
        for rows in shares:
            for row, result in zip(rows, self._run(rows, forward_only=True)):
                setattr(row, field, result["logprobs"])

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of `token_ids[1:]`, each given the ids before it, at temperature 1."""
        assert self.sleeper.weights_awake, "score() while the weights are asleep"
        rest = tuple(token_ids[1:])
        probe = Trajectory("reasoner", tuple(token_ids[:1]), rest, (0.0,) * len(rest), advantage=0.0, reward=0.0)
        plan = plan_rows([probe], len(token_ids), 1, multiple=self._microbatch_multiple)
        [row, *others] = self._tensors(plan * self.layout.data)
        with self._at_temperature(1.0):
            results = self._run([row, *others], forward_only=True)
        mine = dict(zip(row.place_c.tolist(), results[0]["logprobs"].tolist())) if results else {}
        everyone: list[dict[int, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        scores = {place: score for part in everyone for place, score in part.items()}
        return [scores[place] for place in range(len(rest))]

    @contextmanager
    def _at_temperature(self, temperature: float) -> Iterator[None]:
        sampling, self.chunks[-1].temperature = self.chunks[-1].temperature, temperature
        try:
            yield
        finally:
            self.chunks[-1].temperature = sampling

    def _watch(self, trajectories: Sequence[Trajectory], settings: LossSettings) -> StepMetrics:
        """One row's worth of trajectories through the model, without learning from them."""
        seen = [trajectory for trajectory in trajectories if trajectory.completion_ids]
        budget = self.policy_config.tokens_per_microbatch
        [rows] = plan_rows(seen, budget, 1, self.policy_config.shared_prefix, multiple=self._microbatch_multiple)
        plan = [rows[: self._microbatch_multiple]] * self.layout.data
        results = self._run(self._tensors(plan), forward_only=True, settings=settings)
        return StepMetrics(results if self.placement.data_rank == 0 else [], 0.0)

    @property
    def _microbatch_multiple(self) -> int:
        """An interleaved pipeline runs its micro-batches in groups, one for each stage."""
        return self.layout.pipeline if self.layout.virtual > 1 else 1

    def _counts(self, trajectory: Trajectory) -> bool:
        """Whether the trajectory can have a gradient."""
        weight = getattr(self.policy_config.role_weights, trajectory.role)
        always = self.policy_config.entropy_bonus > 0 or (self.policy_config.kl_coefficient or 0.0) > 0
        return bool(trajectory.completion_ids) and weight > 0 and (always or trajectory.advantage != 0)

    def _plan(self, trajectories: Sequence[Trajectory]) -> list[list[Row]]:
        """The rows of one step for every data-parallel rank; in this rank's, each trajectory has its factor 1 / (M L_max) in the
        loss."""
        plan = plan_rows(
            [trajectory for trajectory in trajectories if self._counts(trajectory)],
            self.policy_config.tokens_per_microbatch,
            self.layout.data,
            self.policy_config.shared_prefix,
            self.cost,
            self._microbatch_multiple,
        )
        scale, mine = 1.0 / (max(1, len(trajectories)) * self.loss_length), self.placement.data_rank
        plan[mine] = [tuple(_scaled(block, scale) for block in row) for row in plan[mine]]
        return plan

    def _tensors(self, plan: Sequence[Sequence[Row]]) -> list[RowTensors]:
        """This rank's part of its rows of a plan, on the device."""
        place = self.placement
        lengths = [padded_length(num_tokens(row), self.pad_tokens_to) for rows in plan for row in rows]
        equal = max(lengths, default=0) if self.layout.equal_rows else None
        return [
            row_tensors(
                row,
                self.device,
                equal or padded_length(num_tokens(row), self.pad_tokens_to),
                place.context_rank,
                self.layout.context,
            )
            for row in plan[place.data_rank]
        ]

    def _step(self, rows: Sequence[RowTensors], settings: LossSettings) -> StepMetrics:
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
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

        def forward_step(data: Iterator[RowTensors], model: Any) -> tuple[Any, Any]:
            moved()
            row = next(data)

            def finish(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
                logprobs_c, entropy_c = output
                if settings is None:
                    loss, tensors = logprobs_c.sum() * 0.0, {"logprobs": logprobs_c.detach()}
                else:
                    loss, tensors = row_loss(logprobs_c, entropy_c, row, settings)
                    tensors = {"loss": loss.detach(), **tensors}
                # No tokens to divide the gradient by: the loss is already a share of the global one.
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), tensors

            return model(row), finish

        for wrapped in self.wrapped:
            wrapped.train(not forward_only)
        with torch.set_grad_enabled(not forward_only):
            return self.schedule(
                forward_step_func=forward_step,
                data_iterator=[iter(rows) for _ in self.wrapped],
                model=self.wrapped,
                num_microbatches=len(rows),
                seq_length=max(row.codes_k3.shape[0] for row in rows),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def close(self) -> None:
        """Destroys Megatron's process groups."""
        parallel.shutdown()


def _scaled(block: Block, factor: float) -> Block:
    return replace(block, trajectories=tuple(replace(each, weight=each.weight * factor) for each in block.trajectories))

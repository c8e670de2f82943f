"""Metrics of an update: sums over the tokens of every rank, so that they do not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_spice.policy.packing import Row, num_tokens, num_unshared_tokens

ROLES = ("challenger", "reasoner")


class StepMetrics:
    """What one optimiser step left on this rank: the rows' tensors (on the last pipeline stage) and the gradient norm."""

    def __init__(self, results: Sequence[dict[str, torch.Tensor]], grad_norm: float) -> None:
        self.grad_norm = grad_norm
        # Tensor-parallel ranks hold the same values: one of them reports.
        reports = parallel_state.get_tensor_model_parallel_rank() == 0
        self.results = list(results) if reports else []


class UpdateMetrics:
    """Gathers an iteration's steps."""

    def __init__(self, num_trajectories: int) -> None:
        self.num_trajectories = num_trajectories
        self.steps: list[StepMetrics] = []
        self.rows: list[Row] = []

    def add(self, step: StepMetrics, rows: Sequence[Row]) -> None:
        self.steps.append(step)
        self.rows.extend(rows)

    def summary(self) -> dict[str, float]:
        """Metrics over all ranks, the same on each. Keys: `policy/...` and `drift/...` (|policy - engine| log-prob)."""
        mine = [{name: tensor.cpu() for name, tensor in result.items()} for s in self.steps for result in s.results]
        computed = unshared = 0
        if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_last_stage():
            computed, unshared = sum(map(num_tokens, self.rows)), sum(map(num_unshared_tokens, self.rows))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, computed, unshared))
        results = [result for share, _, _ in everyone for result in share]
        computed, unshared = (sum(share[index] for share in everyone) for index in (1, 2))
        metrics = {
            "policy/trajectories": float(self.num_trajectories),
            "policy/optimizer_steps": float(len(self.steps)),
            "policy/tokens": float(computed),
            "policy/prefix_saving": unshared / computed if computed else 1.0,
        }
        if results:
            metrics |= self._of_tokens(results)
        return metrics

    def _of_tokens(self, results: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        joined = {name: torch.cat([result[name] for result in results]) for name in results[0] if name != "loss"}
        drift = joined["drift"]
        metrics = {
            "policy/loss": float(sum(result["loss"] for result in results)) / len(self.steps),
            "policy/grad_norm": sum(step.grad_norm for step in self.steps) / len(self.steps),
            "policy/entropy": float(joined["entropy"].mean()),
            "policy/clipped": float(joined["clipped"].mean()),
            "policy/completion_tokens": float(drift.numel()),
            "drift/mean": float(drift.mean()),
            "drift/p99": float(drift.quantile(0.99)) if drift.numel() < 2**24 else float(drift.max()),
            "drift/max": float(drift.max()),
        }
        for role, mask in zip(ROLES, (joined["is_challenger"], ~joined["is_challenger"])):
            if mask.any():
                metrics[f"drift/{role}"] = float(drift[mask].mean())
        return metrics

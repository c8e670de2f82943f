"""Metrics of an update: sums over the tokens of every rank, so that they do not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_spice.policy.packing import Row, num_tokens, num_unshared_tokens
from megatron_spice.policy.parallel import Placement

ROLES = ("challenger", "reasoner")
BOUNDS = ("clipped", "dual_clipped", "capped")
SUMS = (
    "loss", "count", "entropy", *BOUNDS, "fresh", "drift", "challenger_fresh", "challenger_drift", "kl", "kl_count", "computed", "unshared",
)  # fmt: skip
BIN, BINS = 0.002, 2000  # of the histogram that the drift's percentile is read from


class StepMetrics:
    """What one optimiser step left on this rank: the rows' tensors (on the last pipeline stage) and the gradient norm."""

    def __init__(self, results: Sequence[dict[str, torch.Tensor]], grad_norm: float) -> None:
        self.grad_norm = grad_norm
        self.results = list(results)


class UpdateMetrics:
    """Gathers an iteration's steps."""

    def __init__(self, num_trajectories: int, placement: Placement) -> None:
        self.num_trajectories = num_trajectories
        self.placement = placement
        self.steps: list[StepMetrics] = []
        self.watched: list[StepMetrics] = []
        self.rows: list[Row] = []

    def add(self, step: StepMetrics, rows: Sequence[Row]) -> None:
        """An optimiser step and the rows it was computed from."""
        self.steps.append(step)
        self.rows.extend(rows)

    def watch(self, step: StepMetrics) -> None:
        """Tokens that were looked at and not learned from."""
        self.watched.append(step)

    def summary(self) -> dict[str, float]:
        """Metrics over all ranks, the same on each. Keys: `policy/...` and `drift/...` (|policy - engine| log-prob, of
        the tokens trained on, of all and by role, p99 to a bin of 0.002). A few numbers a rank travel, never the tokens.

        Tokens that were sampled under older weights (`policy/stale_token_share`) have no part in the drift: the policy has moved
        since, which is no error of the engine's.
        """
        place = self.placement
        results = [result for step in (*self.steps, *self.watched) for result in step.results]
        if place.tensor_rank > 0:
            results = []  # tensor-parallel ranks hold the same values: one of them reports
        sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}
        histograms = torch.zeros(len(ROLES), BINS, dtype=torch.float64)
        peak = torch.zeros((), dtype=torch.float64)
        for result in results:
            _add(result, sums, histograms)
            drift = result["drift"][~result["is_stale"]]
            peak = torch.maximum(peak, drift.max().double().cpu()) if drift.numel() else peak
        if place.is_last_stage and place.tensor_rank == place.context_rank == 0:
            sums["computed"] += sum(map(num_tokens, self.rows))
            sums["unshared"] += sum(map(num_unshared_tokens, self.rows))
        flat = torch.cat([torch.stack(list(sums.values())), histograms.flatten()])
        dist.all_reduce(flat)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        totals, histograms = dict(zip(SUMS, flat.tolist())), flat[len(SUMS) :].view_as(histograms)
        return self._named(totals, histograms, peak.item())

    def _named(self, totals: dict[str, float], histograms: torch.Tensor, peak: float) -> dict[str, float]:
        metrics = {
            "policy/trajectories": float(self.num_trajectories),
            "policy/optimizer_steps": float(len(self.steps)),
            "policy/tokens": totals["computed"],
            "policy/prefix_saving": totals["unshared"] / totals["computed"] if totals["computed"] else 1.0,
        }
        if self.steps:
            metrics["policy/loss"] = totals["loss"] / len(self.steps)
            metrics["policy/grad_norm"] = sum(step.grad_norm for step in self.steps) / len(self.steps)
        if count := totals["count"]:
            metrics |= {
                "policy/entropy": totals["entropy"] / count,
                **{f"policy/{name}": totals[name] / count for name in BOUNDS},
                "policy/completion_tokens": count,
                "policy/stale_token_share": 1.0 - totals["fresh"] / count,
            }
        if fresh := totals["fresh"]:
            metrics |= {
                "drift/mean": totals["drift"] / fresh,
                "drift/p99": min(_p99(histograms.sum(0)), peak),
                "drift/max": peak,
            }
            for role, histogram in zip(ROLES, histograms):
                tokens = totals["challenger_fresh"] if role == "challenger" else fresh - totals["challenger_fresh"]
                drift = totals["challenger_drift"] if role == "challenger" else totals["drift"] - totals["challenger_drift"]
                if tokens:
                    metrics |= {f"drift/{role}": drift / tokens, f"drift/{role}_p99": min(_p99(histogram), peak)}
        if totals["kl_count"]:
            metrics["policy/kl"] = totals["kl"] / totals["kl_count"]
        return metrics


def _p99(histogram: torch.Tensor) -> float:
    """The upper edge of the bin that 99 of 100 are in or below."""
    return (int(torch.searchsorted(histogram.cumsum(0), 0.99 * histogram.sum())) + 1) * BIN


def _add(result: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], histograms: torch.Tensor) -> None:
    """Adds one row's tensors to the sums and its drift to its role's histogram, whose last bin is open."""
    fresh = ~result["is_stale"]
    drift, challenger = result["drift"][fresh].double().cpu(), result["is_challenger"][fresh].cpu()
    sums["loss"] += result["loss"].double().cpu()
    sums["count"] += fresh.numel()
    sums["fresh"] += drift.numel()
    sums["entropy"] += result["entropy"].double().sum().cpu()
    for name in BOUNDS:
        sums[name] += result[name].double().sum().cpu()
    sums["drift"] += drift.sum()
    sums["challenger_fresh"] += challenger.sum()
    sums["challenger_drift"] += drift[challenger].sum()
    if "kl" in result:
        sums["kl"] += result["kl"].double().sum().cpu()
        sums["kl_count"] += result["kl"].numel()
    bins = (drift / BIN).long().clamp(max=BINS - 1)
    for histogram, its in zip(histograms, (challenger, ~challenger)):
        histogram += torch.bincount(bins[its], minlength=BINS)

"""The DrGRPO loss on one row (paper section 2.4; Dr. GRPO, arXiv 2503.20783).

    L = - 1/M sum_i 1/L_max sum_t  w_it min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)

M counts every trajectory of the optimiser step on all ranks and L_max is a constant, so neither packing nor the number of
micro-batches or ranks changes the loss. No KL term. With one step for each rollout rho is 1 and its gradient that of the
log-probability: REINFORCE with the group's mean as baseline, nothing to clip. w is 1, or with importance_cap C the
truncated importance weight min(pi_old / pi_engine, C) against the engine's own probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_spice.policy.rows import RowTensors


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the loss needs besides the row. `clip_ratio` None: one step for each rollout, nothing to clip."""

    clip_ratio: float | None
    importance_cap: float | None


def row_loss(
    logprobs_c: torch.Tensor, entropy_c: torch.Tensor, row: RowTensors, settings: LossSettings
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over the row's completion tokens; `row.weights_c` already holds 1 / (M L_max).

    Returns:
        The row's share of L (float32 scalar) and tensors for the metrics, each [c] and detached.
    """
    now = logprobs_c.detach()
    old = now if row.old_logprobs_c is None else row.old_logprobs_c
    ratio = (logprobs_c - old).exp()
    objective = ratio * row.advantages_c
    clipped = torch.zeros_like(now, dtype=torch.bool)
    if settings.clip_ratio is not None:
        bounded = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio) * row.advantages_c
        clipped = (bounded < objective).detach()
        objective = torch.minimum(objective, bounded)
    if settings.importance_cap is not None:
        objective = objective * (old - row.rollout_logprobs_c).exp().clamp(max=settings.importance_cap)
    loss = -(objective * row.weights_c).sum()
    return loss, {
        "logprobs": now,
        "entropy": entropy_c.detach(),
        "drift": (old - row.rollout_logprobs_c).abs(),
        "clipped": clipped.float(),
        "is_challenger": row.is_challenger_c,
    }

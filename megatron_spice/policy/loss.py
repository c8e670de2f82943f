"""The DrGRPO loss on one row (paper section 2.4; Dr. GRPO, arXiv 2503.20783), and its switches, all off by default.

    L = - 1/M sum_i 1/L_max sum_t  u_i ( w_it S_it + beta H_it - kappa rho K_it )   S = min(rho A, clip(rho, 1 - eps, 1 + eps) A)

M counts every trajectory of the optimiser step on all ranks and L_max is a constant, so neither packing nor the number of
micro-batches or ranks changes the loss. With one step for each rollout rho = pi / pi_old is 1 and its gradient
that of the log-probability: REINFORCE with the group's mean as baseline, nothing to clip.

importance_cap C   w = min(pi_old / pi_engine, C) instead of 1: truncated importance sampling against the engine's own
                   probabilities. It is no part of rho and carries no gradient. pi_engine is what the token was sampled
                   from, also where that was under older weights (rollout.oversample).
dual_clip c > 1    S >= c A where A < 0 (arXiv 1912.09729): without it a token of negative advantage that became much more
                   probable since the rollout is pushed back without bound. Needs a rho, so only with several steps.
entropy_bonus beta H is the entropy of the distribution that the token was drawn from, at the sampling temperature.
kl_coefficient     kappa; K = r - log r - 1 with r = pi_reference / pi, an estimate of the KL divergence that is never negative
                   (Schulman's k3; GRPO, arXiv 2402.03300, equation 4). With rho before it its gradient is that of the
                   divergence, KL(pi, pi_reference), and not only its value (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
role_weights       u, by the role that wrote the trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.rows import RowTensors


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the loss needs besides the row. `clip_ratio` None: one step for each rollout, nothing to clip."""

    clip_ratio: float | None
    importance_cap: float | None
    dual_clip: float | None = None
    entropy_bonus: float = 0.0
    kl_coefficient: float = 0.0
    challenger_weight: float = 1.0
    reasoner_weight: float = 1.0

    @classmethod
    def of(cls, config: PolicyConfig, several_steps: bool) -> LossSettings:
        """The recipe's settings; `several_steps`: the rollout is used for more than one optimiser step."""
        return cls(
            clip_ratio=config.clip_ratio if several_steps else None,
            importance_cap=config.importance_cap,
            dual_clip=config.dual_clip if several_steps else None,
            entropy_bonus=config.entropy_bonus,
            kl_coefficient=config.kl_coefficient or 0.0,
            challenger_weight=config.role_weights.challenger,
            reasoner_weight=config.role_weights.reasoner,
        )


def row_loss(
    logprobs_c: torch.Tensor, entropy_c: torch.Tensor, row: RowTensors, settings: LossSettings
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over the row's completion tokens; `row.weights_c` already holds 1 / (M L_max).

    Returns:
        The row's share of L (float32 scalar) and tensors for the metrics, each [c] and detached; `clipped`,
        `dual_clipped` and `capped` are 1.0 where that bound was the one that held, `kl` is there if the row has log-probs
        of a reference.
    """
    now = logprobs_c.detach()
    old = now if row.old_logprobs_c is None else row.old_logprobs_c
    ratio = (logprobs_c - old).exp()
    objective = ratio * row.advantages_c
    clipped = dual_clipped = capped = torch.zeros_like(now, dtype=torch.bool)
    if settings.clip_ratio is not None:
        bounded = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio) * row.advantages_c
        clipped = (bounded < objective).detach()
        objective = torch.minimum(objective, bounded)
    if settings.dual_clip is not None:
        floor = settings.dual_clip * row.advantages_c
        dual_clipped = ((row.advantages_c < 0) & (objective < floor)).detach()
        objective = torch.where(dual_clipped, floor, objective)
    if settings.importance_cap is not None:
        importance = (old - row.rollout_logprobs_c).exp()
        capped = importance > settings.importance_cap
        objective = objective * importance.clamp(max=settings.importance_cap)
    if settings.entropy_bonus > 0.0:
        objective = objective + settings.entropy_bonus * entropy_c
    measured = {}
    if row.reference_logprobs_c is not None:
        away_c = row.reference_logprobs_c - logprobs_c
        kl_c = away_c.expm1() - away_c  # never below 0, however near the two are
        measured["kl"] = kl_c.detach()
        objective = objective - settings.kl_coefficient * ratio * kl_c
    loss = -(objective * _token_weights(row, settings)).sum()
    return loss, {
        "logprobs": now,
        "entropy": entropy_c.detach(),
        "drift": (old - row.rollout_logprobs_c).abs(),
        "clipped": clipped.float(),
        "dual_clipped": dual_clipped.float(),
        "capped": capped.float(),
        "is_challenger": row.is_challenger_c,
        "is_stale": row.is_stale_c,
        **measured,
    }


def _token_weights(row: RowTensors, settings: LossSettings) -> torch.Tensor:
    if settings.challenger_weight == settings.reasoner_weight == 1.0:
        return row.weights_c
    return row.weights_c * torch.where(row.is_challenger_c, settings.challenger_weight, settings.reasoner_weight)

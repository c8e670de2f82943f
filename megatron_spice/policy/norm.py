"""RMS normalisation for layers without Transformer Engine.

Megatron's local norm refuses sequence parallelism, although the only thing it lacks is a mark: under sequence parallelism
each tensor-parallel rank normalises its own tokens, so the gradients of the scale must be summed over those ranks, and
Megatron sums what is marked `sequence_parallel`.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.policy.norm_kernel import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of any shape; arguments as Megatron's specs give them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

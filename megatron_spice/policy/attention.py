"""The core attention of a packed row, put into Megatron's layer spec at its own slot.

Megatron's local attention materialises the scores of every head; Transformer Engine's knows no tree of completions
behind one prompt. This one hands the row's mask to torch's scaled-dot-product attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class RowAttention(MegatronModule):
    """Attention under an explicit mask. Shapes: s tokens, b rows, n heads, g key-value groups, d head size."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism gathers keys and values before this module"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_sbnd: torch.Tensor,
        key_sbgd: torch.Tensor,
        value_sbgd: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attends where `attention_mask` [s, s] is True. Returns [s, b, n * d]."""
        assert attention_bias is None and packed_seq_params is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            # Expanded by hand: with enable_gqa torch leaves its fused kernel on CPU.
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.scale
        )
        return context.permute(2, 0, 1, 3).flatten(2)

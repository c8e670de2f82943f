"""The core attention of a packed row, put into Megatron's layer spec at its own slot.

Megatron's local attention materialises the scores of every head; Transformer Engine's knows no tree of completions behind
one prompt. This one is given the row's codes (`rows.py`) in the place of a mask and leaves the arithmetic to
`attention_kernels.py`.

Under context parallelism a rank has some of the row's tokens. Queries stay where they are; keys and values are gathered
from the whole context group, and their gradients summed back. That is exact for any mask, at the price of every rank
holding the keys and values of the row for the length of one layer: with grouped queries a small part of the activations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.policy.attention_kernels import attend


class RowAttention(MegatronModule):
    """Attention among the tokens of one row.

    Shapes: q tokens of the row on this rank, k tokens of the whole row, b rows (1), n heads, g key-value groups, d head size.
    """

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
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query_qbnd: torch.Tensor,
        key_qbgd: torch.Tensor,
        value_qbgd: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attends as the codes in `attention_mask` [k, 3] say. Returns [q, b, n * d]."""
        assert attention_bias is None and packed_seq_params is None
        codes_q3 = codes_k3 = attention_mask
        key_kbgd, value_kbgd = key_qbgd, value_qbgd
        if self.context_group.size() > 1:
            codes_q3 = codes_k3.chunk(self.context_group.size())[self.context_group.rank()]
            # One gather for both: it is the latency that counts.
            both = gather_from_sequence_parallel_region(torch.cat((key_qbgd, value_qbgd), -1), group=self.context_group)
            key_kbgd, value_kbgd = both.chunk(2, -1)
        return attend(query_qbnd, key_kbgd, value_kbgd, codes_q3, codes_k3, self.scale)

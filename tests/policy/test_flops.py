"""Operations of an update, against counting the products one by one."""

from __future__ import annotations

from small_models import DENSE, MIXTURE

from megatron_spice.game.records import Trajectory
from megatron_spice.policy.flops import update_flops
from megatron_spice.policy.packing import Block


def _row(prompt: int, *completions: int):
    ids = tuple(range(prompt))
    return (Block(ids, tuple(Trajectory("reasoner", ids, (1,) * n, (0.0,) * n, 1.0, 0.0) for n in completions)),)


def test_a_dense_model():
    a = DENSE
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    weights = a.hidden_size * (queries + 2 * keys) + queries * a.hidden_size + 3 * a.hidden_size * a.ffn_hidden_size
    tokens, pairs, predictions = 5 + 3 + 2, 15 + (6 + 7 + 8) + (6 + 7), 5
    forward = a.num_layers * (2 * weights * tokens + 4 * queries * pairs) + 2 * a.hidden_size * a.vocab_size * predictions
    assert update_flops(a, [_row(5, 3, 2)]) == 3 * forward


def test_a_mixture_counts_the_experts_a_token_goes_through():
    a = MIXTURE
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    weights = 2 * a.hidden_size * (queries + keys) + 3 * a.hidden_size * a.expert_ffn_hidden_size * a.experts_per_token
    forward = a.num_layers * (2 * weights * 3 + 4 * queries * 6) + 2 * a.hidden_size * a.vocab_size
    assert update_flops(a, [_row(2, 1)]) == 3 * forward

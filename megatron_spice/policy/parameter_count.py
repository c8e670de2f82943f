"""How many numbers of the model a rank holds, in plain Python: what weights, gradients and optimiser state are sized by.

Megatron lays the parameters of each chunk of layers one behind the other in one buffer (experts in a second one, because
other ranks reduce them), each parameter beginning at a multiple of 64 numbers and each bucket of the buffer ending at a
multiple of 128 and of the ranks that share its optimiser (`param_and_grad_buffer.py`). Without overlapped reduction a buffer
is one bucket, but for a tied embedding that two pipeline stages hold, which is a bucket of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.vocabulary import padded_vocabulary

START, END = 64, 128
"""A parameter starts at a multiple of the first and a bucket ends at a multiple of the second, in numbers."""


@dataclass(frozen=True, slots=True)
class RankParameters:
    """One rank's numbers.

    Attributes:
        held: in its weight buffers, padding included; gradients have as many.
        stepped: at most so many are in its part of the distributed optimiser.
        linear: of the held ones, in the layers' matrices of each global layer that the rank has (what FP8 is for).
    """

    held: int
    stepped: int
    linear: dict[int, int]


def rank_parameters(architecture: ModelArchitecture, layout: ParallelLayout, stage: int) -> RankParameters:
    """What each rank of pipeline stage `stage` holds; ranks of a stage hold equally much."""
    shared = layout.data * layout.context
    expert_shared = layout.tensor * shared // layout.expert
    held = stepped = 0
    linear = {}
    for chunk in range(stage, len(layout.chunk_layers), layout.pipeline):
        matrices, others, experts = _layer(architecture, layout)
        layers = layout.layers_of(chunk)
        linear |= dict.fromkeys(layers, sum(matrices) + sum(experts))
        dense = [[*matrices, *others] * len(layers)]
        is_last = chunk == len(layout.chunk_layers) - 1
        if is_last:
            dense[0].append(architecture.hidden_size)  # the final norm
        dense += _embeddings(architecture, layout, chunk == 0, is_last, dense[0])
        buckets = [_padded(sizes, shared) for sizes in dense if sizes]
        of_experts = [_padded(experts * len(layers), expert_shared)] if experts else []
        held += sum(buckets) + sum(of_experts)
        stepped += sum(buckets) // shared + sum(of_experts) // expert_shared
    return RankParameters(held, stepped, linear)


def engine_parameters(architecture: ModelArchitecture, ranks: int) -> int:
    """Numbers of the model that one of an engine's tensor-parallel ranks holds: matrices are divided, key/value heads only as
    far as there are any, norms not at all; embeddings are padded to 64 rows a rank."""
    a = architecture
    keys = max(1, a.num_query_groups // ranks) * a.head_dim
    rest = 2 * a.hidden_size + 2 * a.head_dim * a.qk_norm + (a.num_experts or 0) * a.hidden_size
    rest += (a.num_attention_heads * a.head_dim // ranks + 2 * keys) * a.qkv_bias
    embedding = -(-a.vocab_size // (64 * ranks)) * 64 * a.hidden_size
    layers = a.num_layers * (engine_layer_matrices(a, ranks) + rest)
    return layers + a.hidden_size + embedding * (1 if a.tied_embeddings else 2)


def engine_layer_matrices(architecture: ModelArchitecture, ranks: int) -> int:
    """Of them, those in the matrices of one layer, which may be in FP8 (the router is not)."""
    a = architecture
    keys = max(1, a.num_query_groups // ranks) * a.head_dim
    queries = a.num_attention_heads * a.head_dim // ranks
    width = a.num_experts * a.expert_ffn_hidden_size if a.num_experts else a.ffn_hidden_size
    return a.hidden_size * (2 * queries + 2 * keys + 3 * width // ranks)


def _layer(architecture: ModelArchitecture, layout: ParallelLayout) -> tuple[list[int], list[int], list[int]]:
    """Sizes of a layer's matrices, of its other parameters and of its experts' matrices, on one rank."""
    a, tensor = architecture, layout.tensor
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    matrices = [(queries + 2 * keys) // tensor * a.hidden_size, queries // tensor * a.hidden_size]
    others = [a.hidden_size, a.hidden_size]
    if a.qkv_bias:
        others.append((queries + 2 * keys) // tensor)
    if a.qk_norm:
        others += [a.head_dim, a.head_dim]
    if a.num_experts is None:
        width = a.ffn_hidden_size // tensor
        return [*matrices, 2 * width * a.hidden_size, width * a.hidden_size], others, []
    others.append(a.num_experts * a.hidden_size)  # the router
    expert = [2 * a.expert_ffn_hidden_size * a.hidden_size, a.expert_ffn_hidden_size * a.hidden_size]
    return matrices, others, expert * (a.num_experts // layout.expert)


def _embeddings(
    architecture: ModelArchitecture, layout: ParallelLayout, is_first: bool, is_last: bool, rest: list[int]
) -> list[list[int]]:
    """Buckets of their own for embedding and output matrix; those that need none are added to `rest`."""
    matrix = padded_vocabulary(architecture.vocab_size, layout.tensor) // layout.tensor * architecture.hidden_size
    if not architecture.tied_embeddings:
        rest += [matrix] * (is_first + is_last)
    elif layout.pipeline == 1:
        rest += [matrix] * (is_first or is_last)
    elif is_first or is_last:
        return [[matrix]]
    return []


def _padded(sizes: Sequence[int], ranks: int) -> int:
    return _up(sum(_up(size, START) for size in sizes), math.lcm(END, ranks))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

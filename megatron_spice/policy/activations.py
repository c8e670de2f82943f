"""An estimate of what an update's largest micro-batch takes besides weights, gradients and optimiser state.

Counted is what autograd saves of a layer, tensor by tensor, for the layers as `model_spec.py` builds them (s tokens a rank,
h hidden, q and k the rank's query and key numbers a token, f its MLP width; norms and residuals a share 1/sp of tokens):

    norms       4 h / sp                inputs and outputs of two
    attention   2 q + 2 k + k ...       rotated queries and keys, values, the result; and their sources (see `_attention`)
    MLP         3 f                     before and after the activation; a mixture: (h + 4 f) for each expert of a token
    output      3 h, float32 logits of `policy.logprob_chunk` tokens, and the output matrix's gradient

A pipeline stage holds the micro-batches that it has forwarded and not yet reversed: stage r of p has p - r of them, more
with several chunks (Megatron's `get_pp_rank_microbatches`). Recomputation keeps inputs and has one layer's worth at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.weights.vocabulary import padded_vocabulary

SCALE = 1 + 4 / 128
"""Bytes of a number in FP8 with its share of a block's scale."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one rank: what is `saved` for backward at most, and what `works` beside it at a time."""

    saved: int
    works: int

    @property
    def peak(self) -> int:
        return self.saved + self.works


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Numbers per token of one rank (see the top of the file), bytes of a number, and of one that a linear layer saves."""

    h: int
    q: int
    k: int
    f: int
    sp: int
    wide: int
    narrow: float


def activations(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, stage: int, row_tokens: int, on_cuda: bool
) -> Activations:
    """Of the ranks of pipeline stage `stage`.

    Args:
        row_tokens: length of the longest row, all context-parallel ranks together.
        on_cuda: layers are Transformer Engine's, which save the inputs of FP8 products in FP8.
    """
    a, tensor = architecture, layout.tensor
    wide = 4 if config.precision == "fp32" else 2
    size = _Sizes(
        h=a.hidden_size, q=a.num_attention_heads * a.head_dim // tensor, k=a.num_query_groups * a.head_dim // tensor,
        f=a.expert_ffn_hidden_size if a.num_experts else a.ffn_hidden_size // tensor,
        sp=tensor if layout.sequence_parallel else 1, wide=wide,
        narrow=SCALE if config.precision == "fp8" and on_cuda else wide,
    )  # fmt: skip
    tokens = -(-row_tokens // layout.context)
    whole, kept = _layer(architecture, layout, size), size.h * wide / size.sp
    a_layer = {"none": whole, "full": kept}.get(config.recompute)
    if a_layer is None:
        a_layer = whole - sum(_recomputed(architecture, size, module) for module in config.recompute_modules)
    chunks = [layout.chunk_layers[chunk] for chunk in range(stage, len(layout.chunk_layers), layout.pipeline)]
    saved = tokens * a_layer * _layers_in_flight(layout, stage, chunks)
    works = tokens * (whole - a_layer + _backward(architecture, layout, size))
    if stage == (len(layout.chunk_layers) - 1) % layout.pipeline:
        saved += tokens * size.h * (2 * wide / size.sp + wide)
        works = max(works, _output(architecture, config, layout, size, tokens, on_cuda))
    return Activations(round(saved), round(works))


def _layers_in_flight(layout: ParallelLayout, stage: int, chunks: list[int]) -> int:
    """Layers times micro-batches whose activations a stage holds at a time."""
    behind = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return (behind + 1) * chunks[0]
    forwards = 2 * behind + (layout.virtual - 1) * layout.pipeline + 1
    # They come in turns: as many of a chunk as there are stages, then as many of the next.
    full, rest = divmod(forwards, layout.pipeline)
    turns = [chunks[turn % layout.virtual] for turn in range(full + 1)]
    return layout.pipeline * sum(turns[:full]) + rest * turns[full]


def _layer(architecture: ModelArchitecture, layout: ParallelLayout, size: _Sizes) -> float:
    """Bytes a token that one layer saves."""
    norms = size.h * (2 * size.wide + 2 * size.narrow) / size.sp
    return norms + _attention(architecture, layout, size) + _mlp(architecture, size)


def _attention(architecture: ModelArchitecture, layout: ParallelLayout, size: _Sizes) -> float:
    """Values are a view of the product of queries, keys and values, which is kept whole for them; context parallelism copies
    them, to all ranks. Rotations by an angle save its cosine and sine, for queries and keys each."""
    a = architecture
    product, gathered = size.q + 2 * size.k, 2 * size.k * layout.context
    numbers = 2 * size.q + 4 * a.head_dim
    numbers += gathered if layout.context > 1 else size.k
    if a.qk_norm:
        numbers += size.q + product  # what was normalised
    elif layout.context == 1:
        numbers += product
    as_input = size.q * size.narrow if size.narrow != size.wide else 0
    return numbers * size.wide + as_input + 4 * a.num_attention_heads / layout.tensor


def _mlp(architecture: ModelArchitecture, size: _Sizes) -> float:
    a = architecture
    if a.num_experts is None:
        return size.f * (2 * size.wide + size.narrow)
    an_expert = size.h * size.narrow + size.f * (3 * size.wide + size.narrow)
    return (a.experts_per_token * an_expert + 16 * a.num_experts) / size.sp


def _recomputed(architecture: ModelArchitecture, size: _Sizes, module: str) -> float:
    """Bytes a token that a layer does not save if this module of it is recomputed."""
    a = architecture
    if module in ("mlp", "moe"):
        return _mlp(architecture, size)
    if module == "layernorm":
        return 2 * size.h * size.narrow / size.sp
    return 0.0  # core_attn: what goes in is kept, and what comes out is the next product's input


def _backward(architecture: ModelArchitecture, layout: ParallelLayout, size: _Sizes) -> float:
    """Bytes a token of a layer's gradients that exist at a time: of the wider of its two halves."""
    chosen = architecture.experts_per_token / size.sp if architecture.num_experts else 1
    mlp = chosen * (3 * size.f + size.h) * size.wide
    attention = (4 * size.q + 4 * size.k * layout.context) * size.wide + 4 * (size.q + 2 * size.k * layout.context)
    return max(mlp, attention) + 3 * size.h * size.wide


def _output(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, size: _Sizes, tokens: int, on_cuda: bool
) -> float:
    """Bytes while the output matrix is worked on (`logprobs.py`): float32 gradient of what it meets, the matrix's own
    gradient, and a tile of logits; on a CPU only the tile's gradient is of that size."""
    rows = padded_vocabulary(architecture.vocab_size, layout.tensor) // layout.tensor
    tile = min(config.logprob_chunk, tokens) * rows
    a_logit = size.wide + (4 + size.wide if on_cuda else 0) + (4 if on_cuda and config.entropy_bonus else 0)
    return tokens * size.h * (4 + size.wide) + rows * size.h * size.wide + tile * a_logit

"""What a checkpoint holds, for people, without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.convert.source import Source
from megatron_spice.weights.names import hf_shapes


def lines(source: Source, with_tensors: bool) -> Iterator[str]:
    """Kind and layout, architecture, parameters by precision, sizes; then each tensor, if wanted."""
    a = source.architecture
    numbers: Counter[str] = Counter()
    num_bytes = 0
    for entry in source.entries:
        dtype = source.dtype(entry)
        count = sum(math.prod(shape) for shape in hf_shapes(entry, a).values())
        numbers[str(dtype).removeprefix("torch.")] += count
        num_bytes += count * dtype.itemsize
    total = sum(numbers.values())
    precisions = ", ".join(f"{dtype} {count / total:.0%}" if len(numbers) > 1 else dtype for dtype, count in numbers.items())
    stored = sum(path.stat().st_size for path in source.paths)
    yield f"{source.folder}: {source.kind}; " + "; ".join(source.describe())
    yield f"  model       {_model(a)}"
    yield f"  attention   {_attention(a)}"
    yield f"  MLP         {_mlp(a)}"
    yield f"  vocabulary  {a.vocab_size} tokens, {'tied' if a.tied_embeddings else 'untied'} head"
    yield f"  parameters  {total:,} ({precisions}), {num_bytes / 1e9:.3f} GB; files {stored / 1e9:.3f} GB"
    if with_tensors:
        for entry in source.entries:
            dtype = str(source.dtype(entry)).removeprefix("torch.")
            yield from (f"{name}  {list(shape)}  {dtype}" for name, shape in hf_shapes(entry, a).items())


def _model(a: ModelArchitecture) -> str:
    rope = f"rope base {a.rope_theta:g}" + (f", scaled {a.rope_scaling}" if a.rope_scaling else "")
    return f"{a.family}, {a.num_layers} layers of width {a.hidden_size}, {rope}, {a.max_position_embeddings} positions"


def _attention(a: ModelArchitecture) -> str:
    extras = ", biases" * a.qkv_bias + ", normalised queries and keys" * a.qk_norm
    return f"{a.num_attention_heads} heads of {a.head_dim} in {a.num_query_groups} groups{extras}"


def _mlp(a: ModelArchitecture) -> str:
    if a.num_experts is None:
        return f"gated, width {a.ffn_hidden_size}"
    return f"{a.num_experts} experts of width {a.expert_ffn_hidden_size}, {a.experts_per_token} for each token"

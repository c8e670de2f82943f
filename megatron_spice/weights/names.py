"""The one table of names: which Hugging Face tensors make which Megatron tensor, and how it is split over ranks.

Loading, offline conversion, export and the sync to the engines all read this table, so they cannot disagree. An entry is
a Megatron name, the Hugging Face names it is made of, and a kind. A kind is two functions: `split_for_rank` makes a
tensor-parallel rank's slice of Megatron's tensor from the Hugging Face ones and `merge_ranks` undoes it.

QKV, as Megatron orders it: for each key-value group its query heads, then its key, then its value. Gated MLP: each rank
holds its slice of the gate, then its slice of the up projection, so its whole is not a plain concatenation of slices.
Experts are dealt to ranks whole, so a slice of an expert is all of it; Hugging Face's files hold them one by one, whatever
the library does with them in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.vocabulary import padded_vocabulary

Kind = Literal["replicated", "vocabulary", "row", "qkv", "gated"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor.

    `names` are the names it may have in a model, with `{layer}` and `{expert}` for the numbers that these have where they
    are held: first that of Megatron's own layers, then that of Transformer Engine's, where it differs. `layer` and `expert`
    are the numbers in the whole model; None outside the layers or experts.

    `stage` says which pipeline stages hold it: "first", "last", "layer" (the one with the layer), or "both" (a tied
    embedding: the model's first chunk embeds with it, the last one predicts with a copy).
    """

    names: tuple[str, ...]
    hf: tuple[str, ...]
    kind: Kind
    stage: Literal["first", "last", "layer", "both"]
    layer: int | None = None
    expert: int | None = None


def table(architecture: ModelArchitecture) -> list[Entry]:
    """Every tensor of the model, first to last."""
    tied = architecture.tied_embeddings
    embedding = Entry(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocabulary", "both" if tied else "first"
    )
    entries = [embedding]
    for layer in range(architecture.num_layers):
        entries += _attention_entries(architecture, layer)
        entries += _dense_entries(layer) if architecture.num_experts is None else _expert_entries(architecture, layer)
    entries.append(Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), "replicated", "last"))
    if not tied:
        entries.append(Entry(("output_layer.weight",), ("lm_head.weight",), "vocabulary", "last"))
    return entries


def _entry(layer: int, names: str | tuple[str, ...], kind: Kind, *hf: str, expert: int | None = None) -> Entry:
    ours = tuple("decoder.layers.{layer}." + name for name in ([names] if isinstance(names, str) else names))
    return Entry(ours, tuple(f"model.layers.{layer}.{name}" for name in hf), kind, "layer", layer, expert)


def _attention_entries(architecture: ModelArchitecture, layer: int) -> list[Entry]:
    heads = ("q_proj", "k_proj", "v_proj")
    norm = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    entries = [
        _entry(layer, norm, "replicated", "input_layernorm.weight"),
        _entry(layer, "self_attention.linear_qkv.weight", "qkv", *(f"self_attn.{head}.weight" for head in heads)),
        _entry(layer, "self_attention.linear_proj.weight", "row", "self_attn.o_proj.weight"),
    ]
    if architecture.qkv_bias:
        biases = (f"self_attn.{head}.bias" for head in heads)
        entries.append(_entry(layer, "self_attention.linear_qkv.bias", "qkv", *biases))
    if architecture.qk_norm:
        entries.append(_entry(layer, "self_attention.q_layernorm.weight", "replicated", "self_attn.q_norm.weight"))
        entries.append(_entry(layer, "self_attention.k_layernorm.weight", "replicated", "self_attn.k_norm.weight"))
    return entries


def _dense_entries(layer: int) -> list[Entry]:
    norm = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return [
        _entry(layer, norm, "replicated", "post_attention_layernorm.weight"),
        _entry(layer, "mlp.linear_fc1.weight", "gated", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        _entry(layer, "mlp.linear_fc2.weight", "row", "mlp.down_proj.weight"),
    ]


def _expert_entries(architecture: ModelArchitecture, layer: int) -> list[Entry]:
    entries = [
        _entry(layer, "pre_mlp_layernorm.weight", "replicated", "post_attention_layernorm.weight"),
        _entry(layer, "mlp.router.weight", "replicated", "mlp.gate.weight"),
    ]
    for expert in range(architecture.num_experts):
        theirs = f"mlp.experts.{expert}."
        for linear, kind, projections in (("fc1", "gated", ("gate_proj", "up_proj")), ("fc2", "row", ("down_proj",))):
            names = (
                f"mlp.experts.local_experts.{{expert}}.linear_{linear}.weight",
                f"mlp.experts.linear_{linear}.weight{{expert}}",  # all of a rank's experts in one module
            )
            hf = (f"{theirs}{projection}.weight" for projection in projections)
            entries.append(_entry(layer, names, kind, *hf, expert=expert))
    return entries


def split_for_rank(
    entry: Entry,
    tensors: Sequence[torch.Tensor],
    architecture: ModelArchitecture,
    rank: int,
    size: int,
    cut_experts: bool = False,
) -> torch.Tensor:
    """The slice of one Megatron tensor that tensor-parallel rank `rank` of `size` holds.

    Args:
        tensors: the Hugging Face tensors, in the order of `entry.hf`.
        cut_experts: experts are cut too, as Megatron-LM does unless it is told otherwise.
    """
    if entry.expert is not None and not cut_experts:
        rank, size = 0, 1
    if entry.kind == "replicated":
        return tensors[0]
    if entry.kind == "row":
        return tensors[0].chunk(size, dim=1)[rank]
    if entry.kind == "gated":
        return torch.cat([tensor.chunk(size, dim=0)[rank] for tensor in tensors])
    if entry.kind == "vocabulary":
        return _pad_rows(tensors[0], padded_vocabulary(architecture.vocab_size, size)).chunk(size, dim=0)[rank]
    return _join_qkv(tensors, architecture).chunk(size, dim=0)[rank]


def merge_ranks(
    entry: Entry, slices: Sequence[torch.Tensor], architecture: ModelArchitecture, cut_experts: bool = False
) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors made of every tensor-parallel rank's slice, in order of rank; `split_for_rank` undone. They may
    be views of the slices; the rows of queries, keys and values are in two dimensions, [group, row], of one such view.

    Where every rank holds all of it (norms, the router, an expert) one slice is enough.
    """
    if entry.expert is not None and not cut_experts:
        slices = slices[:1]
    if entry.kind == "replicated":
        return {entry.hf[0]: slices[0]}
    if entry.kind == "row":
        return {entry.hf[0]: _join(slices, dim=1)}
    if entry.kind == "gated":
        halves = [part.chunk(2) for part in slices]
        return {name: _join([half[index] for half in halves]) for index, name in enumerate(entry.hf)}
    if entry.kind == "vocabulary":
        return {entry.hf[0]: _join(slices)[: architecture.vocab_size]}
    return dict(zip(entry.hf, _part_qkv(_join(slices), architecture)))


def _join(slices: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(list(slices), dim=dim)


def hf_shapes(entry: Entry, architecture: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """The shape each of the entry's Hugging Face tensors must have."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    width = a.ffn_hidden_size if entry.expert is None else a.expert_ffn_hidden_size
    rows = {
        "q_proj": (queries, a.hidden_size),
        "k_proj": (keys, a.hidden_size),
        "v_proj": (keys, a.hidden_size),
        "o_proj": (a.hidden_size, queries),
        "gate_proj": (width, a.hidden_size),
        "up_proj": (width, a.hidden_size),
        "down_proj": (a.hidden_size, width),
        "gate": (a.num_experts or 0, a.hidden_size),
        "embed_tokens": (a.vocab_size, a.hidden_size),
        "lm_head": (a.vocab_size, a.hidden_size),
        "q_norm": (a.head_dim,),
        "k_norm": (a.head_dim,),
    }
    shapes = {}
    for name in entry.hf:
        module, leaf = name.split(".")[-2:]
        shape = rows.get(module, (a.hidden_size,))
        shapes[name] = shape[:1] if leaf == "bias" else shape
    return shapes


def rank_shape(entry: Entry, architecture: ModelArchitecture, size: int, cut_experts: bool = False) -> tuple[int, ...]:
    """The shape of what `split_for_rank` gives each of `size` tensor-parallel ranks."""
    shapes = list(hf_shapes(entry, architecture).values())
    rows, *rest = shapes[0]
    if entry.kind == "replicated":
        return shapes[0]
    size = 1 if entry.expert is not None and not cut_experts else size
    if entry.kind == "row":
        return rows, rest[0] // size
    if entry.kind == "vocabulary":
        return padded_vocabulary(rows, size) // size, *rest
    return sum(shape[0] for shape in shapes) // size, *rest


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _join_qkv(tensors: Sequence[torch.Tensor], architecture: ModelArchitecture) -> torch.Tensor:
    """[q], [k], [v] (weights [n d, h] or biases [n d]) to Megatron's interleaved order."""
    groups = architecture.num_query_groups
    rest = tensors[0].shape[1:]
    return torch.cat([tensor.reshape(groups, -1, *rest) for tensor in tensors], dim=1).reshape(-1, *rest)


def _part_qkv(joined: torch.Tensor, architecture: ModelArchitecture) -> list[torch.Tensor]:
    """Megatron's interleaved order as [groups, rows of a group, ...] of queries, keys and values."""
    a = architecture
    rest = joined.shape[1:]
    sizes = [a.num_attention_heads // a.num_query_groups * a.head_dim, a.head_dim, a.head_dim]
    return list(joined.reshape(a.num_query_groups, -1, *rest).split(sizes, dim=1))

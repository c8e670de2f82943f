"""The name table: split over any number of ranks and merged back, every tensor is bit for bit what it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import hf_shapes, merge_ranks, split_for_rank, table
from megatron_spice.weights.stage import Stage

ARCHITECTURE = ModelArchitecture(
    family="qwen2", num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=8, num_query_groups=4,
    head_dim=6, vocab_size=301, norm_epsilon=1e-5, rope_theta=1e4, rope_scaling=None, max_position_embeddings=64,
    tied_embeddings=False, qkv_bias=True, qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_and_merge_are_inverse(size):
    for entry in table(ARCHITECTURE):
        tensors = [torch.randn(shape) for shape in hf_shapes(entry, ARCHITECTURE).values()]
        slices = [split_for_rank(entry, tensors, ARCHITECTURE, rank, size) for rank in range(size)]
        merged = merge_ranks(entry, slices, ARCHITECTURE)
        assert list(merged) == list(entry.hf)
        for tensor, back in zip(tensors, merged.values()):
            assert torch.equal(tensor, back), entry.megatron


def test_slices_of_qkv_hold_whole_groups():
    entry = next(entry for entry in table(ARCHITECTURE) if entry.kind == "qkv" and entry.megatron.endswith("weight"))
    queries, keys, values = (torch.full(shape, float(i)) for i, shape in enumerate(hf_shapes(entry, ARCHITECTURE).values()))
    first = split_for_rank(entry, [queries, keys, values], ARCHITECTURE, 0, 4)
    assert first[:, 0].tolist() == [0.0] * 12 + [1.0] * 6 + [2.0] * 6  # two query heads, one key, one value


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_entry_has_one_owner_that_holds_it(size, tied):
    architecture = dataclasses.replace(ARCHITECTURE, tied_embeddings=tied)
    stages = [Stage(rank, size, architecture.num_layers) for rank in range(size)]
    for entry in table(architecture):
        assert stages[stages[0].owner(entry)].local_name(entry) is not None
        holders = [stage.rank for stage in stages if stage.local_name(entry) is not None]
        assert len(holders) == (2 if entry.stage == "both" and size > 1 else 1)
    names = [name for name in (stages[-1].local_name(entry) for entry in table(architecture)) if name]
    assert len(names) == len(set(names)) and any(".layers.0." in name for name in names)

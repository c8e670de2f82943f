"""The name table: split over any number of ranks and merged back, every tensor is bit for bit what it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import DENSE, MIXTURE, make_model

from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.weights.names import hf_shapes, merge_ranks, split_for_rank, table

@pytest.mark.parametrize("architecture", [DENSE, MIXTURE], ids=lambda architecture: architecture.family)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_and_merge_are_inverse(size, architecture):
    for entry in table(architecture):
        tensors = [torch.randn(shape) for shape in hf_shapes(entry, architecture).values()]
        slices = [split_for_rank(entry, tensors, architecture, rank, size) for rank in range(size)]
        merged = merge_ranks(entry, slices, architecture)
        assert list(merged) == list(entry.hf)
        for tensor, back in zip(tensors, merged.values()):
            assert torch.equal(tensor, back.reshape(tensor.shape)), entry.names


def test_slices_of_qkv_hold_whole_groups():
    entry = next(entry for entry in table(DENSE) if entry.kind == "qkv" and entry.names[0].endswith("weight"))
    queries, keys, values = (torch.full(shape, float(i)) for i, shape in enumerate(hf_shapes(entry, DENSE).values()))
    first = split_for_rank(entry, [queries, keys, values], DENSE, 0, 4)
    assert first[:, 0].tolist() == [0.0] * 12 + [1.0] * 6 + [2.0] * 6  # two query heads, one key, one value


def test_every_rank_of_a_tensor_group_has_its_experts_whole():
    entry = next(entry for entry in table(MIXTURE) if entry.expert is not None and entry.kind == "gated")
    gate, up = (torch.full(shape, float(i)) for i, shape in enumerate(hf_shapes(entry, MIXTURE).values()))
    for rank in range(4):
        assert split_for_rank(entry, [gate, up], MIXTURE, rank, 4)[:, 0].tolist() == [0.0] * 20 + [1.0] * 20


@pytest.mark.parametrize("family, tied", [
    ("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True), ("qwen3_moe", False), ("qwen3_moe", True),
])  # fmt: skip
def test_the_table_has_what_transformers_writes(tmp_path, family, tied):
    folder = make_model(tmp_path, family, tied, num_hidden_layers=2)
    architecture = read_architecture(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    entries = table(architecture)
    assert {name: shape for entry in entries for name, shape in hf_shapes(entry, architecture).items()} == shapes
    assert sum(len(entry.hf) for entry in entries) == len(shapes), "a tensor is in two entries"


def test_older_files_count_experts_under_another_name(tmp_path):
    folder = make_model(tmp_path, "qwen3_moe", tied=False, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    assert ModelArchitecture.from_config(config) == read_architecture(folder)

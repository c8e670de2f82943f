"""Reading Hugging Face folders refuses what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from hf_folders import write_tensors
from safetensors.torch import load_file, save_file
from small_models import make_model

from megatron_spice.config.hf import read_architecture
from megatron_spice.weights.hf_folder import HFTensors
from megatron_spice.weights.names import table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama") / "hf", "llama", tied=False)


def test_shards_are_read_by_name(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    write_tensors(tmp_path, tensors, shards=3)
    back = HFTensors(tmp_path)
    back.check(table(read_architecture(folder)), read_architecture(folder))
    assert set(back.files) == set(tensors) and len(back.paths) == 4
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.norm.weight"), ["missing", "model.norm.weight"]),
    (lambda t: t.update(stranger=torch.zeros(1)), ["unexpected", "stranger"]),
    (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), ["model.norm.weight", "(3,)", "(64,)"]),
])  # fmt: skip
def test_names_and_shapes_that_do_not_fit_are_named(folder, tmp_path, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    architecture = read_architecture(tmp_path)
    with pytest.raises(ValueError) as error:
        HFTensors(tmp_path).check(table(architecture), architecture)
    assert all(word in str(error.value) for word in words)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        HFTensors(tmp_path)

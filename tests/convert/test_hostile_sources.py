"""Sources that are broken, incomplete, of another model, or made to do harm: an error that names what is wrong, and no target."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conversions import to_hf, to_mp_rank, to_torch_dist
from hf_folders import assert_same_model, read_tensors, write_model, write_tensors

from megatron_spice.config.errors import ConfigError
from megatron_spice.convert.find import open_source

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def assert_refused(folder: Path, *words: str, hf: Path | None = None) -> None:
    with pytest.raises((ValueError, FileNotFoundError, ConfigError)) as error:
        to_torch_dist(folder, folder.parent / "target", hf)
    assert all(word in str(error.value) for word in words), error.value
    assert not (folder.parent / "target").exists()


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "hf", "llama", shards=2, tie_word_embeddings=True)


def _rewrite(model: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**read_tensors(model), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    write_tensors(model, {name: tensor for name, tensor in tensors.items() if tensor is not None}, shards=2)


def test_names_that_are_missing_or_extra(model):
    _rewrite(model, model__norm__weight=None, stranger=torch.zeros(2))
    assert_refused(model, "missing ['model.norm.weight']", "unexpected ['stranger']")


def test_shapes_of_another_model(model):
    _rewrite(model, model__norm__weight=torch.zeros(23, dtype=torch.bfloat16))
    assert_refused(model, NORM, "(23,)", "(24,)")


def test_numbers_that_are_no_weights(model):
    _rewrite(model, model__norm__weight=torch.zeros(24, dtype=torch.int64))
    assert_refused(model, NORM, "I64", "BF16")


def test_a_truncated_file_and_a_lost_one(model):
    shard = next(iter(sorted(model.glob("*.safetensors"))))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert_refused(model, shard.name, "cannot be read")
    shard.write_bytes(whole[:5])
    assert_refused(model, shard.name, "cannot be read")
    shard.unlink()
    assert_refused(model, shard.name, "cannot be read")


@pytest.mark.parametrize("text", [
    "", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000, '{"weight_map": {"a": "../b"}}'
])  # fmt: skip
def test_an_index_that_is_none(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    assert_refused(model, "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"model_type": "mamba"}'])
def test_a_configuration_that_is_none(model, text):
    (model / "config.json").write_text(text)
    assert_refused(model, "config.json")


def test_a_tied_head_is_taken_for_the_embedding_only_if_it_is_one(model, tmp_path):
    whole = read_tensors(model)
    write_tensors(model, {**whole, HEAD: whole[EMBEDDING].clone()})
    back = to_hf(to_torch_dist(model, tmp_path / "megatron"), tmp_path / "back")
    assert read_tensors(back).keys() == whole.keys()
    write_tensors(model, {**whole, HEAD: whole[EMBEDDING].roll(1, 0)})
    assert_refused(model, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


def test_buffers_of_old_versions_are_left_out(model, tmp_path):
    whole = read_tensors(model)
    _rewrite(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    assert read_tensors(to_hf(to_torch_dist(model, tmp_path / "megatron"), tmp_path / "back")).keys() == whole.keys()


def test_links_are_followed_and_must_lead_somewhere(model, tmp_path):
    blobs = tmp_path / "blobs"
    model.rename(blobs)
    model.mkdir()
    for path in blobs.rglob("*"):
        if path.is_file():
            (model / path.relative_to(blobs)).parent.mkdir(exist_ok=True)
            (model / path.relative_to(blobs)).symlink_to(path)
    back = to_hf(to_torch_dist(model, tmp_path / "megatron"), tmp_path / "back")
    assert_same_model(blobs, back)
    assert not any(path.is_symlink() for path in back.rglob("*"))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(model / "tokenizer.json")
    assert_refused(model, "tokenizer.json is a link that leads nowhere")


def test_a_torch_dist_folder_of_another_model_or_not_whole(model, tmp_path):
    ours = to_torch_dist(model, tmp_path / "megatron")
    config = json.loads((ours / "hf" / "config.json").read_text())
    for key, value, word in [
        ("num_hidden_layers", 5, "4"), ("hidden_size", 48, "48"), ("vocab_size", 513, "513"), ("model_type", "qwen2", "qkv.bias"),
        ("tie_word_embeddings", False, "missing ['output_layer.weight']"),
    ]:  # fmt: skip
        (ours / "hf" / "config.json").write_text(json.dumps({**config, key: value}))
        assert_refused(ours, word)
    (ours / "hf" / "config.json").write_text(json.dumps(config))
    [data] = (ours / "weights").glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert_refused(ours, data.name, "bytes", "copy the folder again")
    data.write_bytes(bytes(len(whole)))
    assert_refused(ours, data.name, "is damaged at byte 0")
    data.unlink()
    assert_refused(ours, data.name, "is not there")


class _Harm:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_pickles_that_would_run_something_do_not(model, tmp_path):
    ours = to_torch_dist(model, tmp_path / "megatron")
    (ours / "weights" / ".metadata").write_bytes(pickle.dumps(_Harm(tmp_path / "harm")))
    assert_refused(ours, ".metadata", "posix.mkdir")
    ranks = to_mp_rank(model, tmp_path / "ranks")
    torch.save({"model": {}, "args": _Harm(tmp_path / "harm")}, ranks / "release" / "mp_rank_00" / "model_optim_rng.pt")
    assert_refused(ranks, "would run", "posix.mkdir", hf=model)
    assert not (tmp_path / "harm").exists()


def test_files_for_each_rank_of_another_model_or_not_whole(model, tmp_path):
    other = write_model(tmp_path / "other", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    ranks = to_mp_rank(model, tmp_path / "ranks", tensor=2, pipeline=2)
    with pytest.raises(ValueError, match="give the Hugging Face folder of its model with --hf"):
        open_source(ranks)
    assert_refused(ranks, "trained with num_layers=4", "num_layers=2", hf=other)
    name = ranks / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(name, weights_only=False)
    whole = name.read_bytes()
    for change, word in [({"checkpoint_version": 1.0}, "another order"), ({"model": []}, "neither `model`"),
                         ({"args": argparse.Namespace(num_layers=9)}, "num_layers=9")]:  # fmt: skip
        for path in ranks.glob("release/*/*.pt"):
            path.write_bytes(whole)
            torch.save({**state, **change}, path)
        assert_refused(ranks, word, hf=model)


def test_arguments_that_mean_nothing_to_the_model_are_not_compared(tmp_path):
    model = write_model(tmp_path / "moe", "qwen3_moe")
    ranks = to_mp_rank(model, tmp_path / "ranks")
    path = ranks / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["args"].ffn_hidden_size = 6144
    torch.save(state, path)
    assert_same_model(model, to_hf(ranks, tmp_path / "back", hf=model))
    state["args"].moe_ffn_hidden_size = 6144
    torch.save(state, path)
    assert_refused(ranks, "moe_ffn_hidden_size=6144", "moe_ffn_hidden_size=20", hf=model)


def test_a_lost_rank_and_a_copy_of_the_embedding_that_is_none(model, tmp_path):
    ranks = to_mp_rank(model, tmp_path / "ranks", tensor=2, pipeline=2)
    last = ranks / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(last, weights_only=False)
    state["model"]["output_layer.weight"].zero_()
    torch.save(state, last)
    assert_refused(ranks, "output_layer.weight differs from the embedding", hf=model)
    state["model"]["stranger.weight"] = torch.zeros(1)
    torch.save(state, last)
    assert_refused(ranks, "stranger.weight", hf=model)
    last.unlink()
    assert_refused(ranks, "mp_rank_01_001", hf=model)
    last.parent.rmdir()
    assert_refused(ranks, "no file of tensor rank 1 in pipeline stage 1", hf=model)
    (ranks / "latest_checkpointed_iteration.txt").write_text("12")
    assert_refused(ranks, "iter_0000012", hf=model)

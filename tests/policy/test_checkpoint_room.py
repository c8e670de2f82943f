"""Room for checkpoints: what interrupted saves have left is there to be had, and a run that is over needs none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spice.checkpoint import store
from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.config.schema import Config
from megatron_spice.policy import checkpoint_room

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def architecture(tmp_path) -> ModelArchitecture:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    return read_architecture(tmp_path / "model")


def config_of(tmp_path: Path, iterations: int = 6, resume: str = "auto") -> Config:
    about = {"run": {"dir": tmp_path / "run"}, "corpus": {"path": "/"}, "policy": {"model": tmp_path / "model"}}
    return Config.model_validate({**about, "train": {"iterations": iterations}, "checkpoint": {"keep": 2, "resume": resume}})


def test_a_save_that_was_killed_on_a_disk_with_room_for_one_more_does_not_keep_the_run_from_going_on(tmp_path, architecture, monkeypatch):
    config, folder = config_of(tmp_path), store.folder_of(tmp_path / "run")
    one = checkpoint_room.checkpoint_bytes(config, architecture)
    for iteration in (2, 4):
        store.finish(store.begin(folder, iteration), {"iteration": iteration}, keep=2)
    most = store.begin(folder, 6, attempt="killed") / store.WEIGHTS / "data"
    with open(most, "wb") as file:
        file.write(bytes(int(0.9 * one)))
        os.fsync(file.fileno())
    monkeypatch.setattr(checkpoint_room.os, "statvfs", lambda path: SimpleNamespace(f_bavail=int(0.15 * one), f_frsize=1))
    text, problem = checkpoint_room.describe(config, architecture)
    assert problem is None and "warning" not in text and "interrupted saves have left" in text
    most.unlink()
    text, problem = checkpoint_room.describe(config, architecture)
    assert "a checkpoint takes" in problem and "interrupted" not in text


def test_a_run_that_has_all_its_iterations_is_not_refused_on_a_full_disk(tmp_path, architecture, monkeypatch):
    store.finish(store.begin(store.folder_of(tmp_path / "run"), 4), {"iteration": 4}, keep=2)
    monkeypatch.setattr(checkpoint_room.os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    text, problem = checkpoint_room.describe(config_of(tmp_path, iterations=4), architecture)
    assert problem is None and "is at iteration 4 of 4 already: none will be saved" in text
    for more in (config_of(tmp_path, iterations=5), config_of(tmp_path, iterations=4, resume="never")):
        assert "a checkpoint takes" in checkpoint_room.describe(more, architecture)[1]

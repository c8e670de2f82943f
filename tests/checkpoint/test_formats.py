"""What is saved is what Megatron itself would save, whatever the layout; and through any layouts it comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from small_models import make_model, some_trajectories
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from megatron_spice.config.hf import read_architecture
from megatron_spice.config.schema import Config
from megatron_spice.policy import checkpoint_room

ON_RANKS = Path(__file__).with_name("formats_on_ranks.py")
TP_PP = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
# name: model, layout of four ranks; without anything else what is left is data parallel
LAYOUTS = {
    "data 4": ("dense", {}),
    "tensor 2, pipeline 2": ("dense", TP_PP),
    "tensor 2, data 2, bf16": ("dense", {"tensor_parallel_size": 2, "precision": "bf16"}),
    "virtual pipeline, data 2": ("dense", {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "context 2, data 2": ("dense", {"context_parallel_size": 2}),
    "expert 2, data 2": ("mixture", {"expert_parallel_size": 2}),
    "tensor 2, expert 2": ("mixture", {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "tensor 4, one expert rank": ("mixture", {"tensor_parallel_size": 4}),
}
# From one to the next: what the first learned is loaded and saved by all the others. The last is of one rank.
DENSE = ["tensor 2, pipeline 2", "data 4", "virtual pipeline, data 2"]
MIXTURE = ["expert 2, data 2", "tensor 4, one expert rank", "tensor 2, expert 2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders `NAME/ours`, `NAME/megatrons`, `NAME/after` (loaded from the one before it) and `dense`, `mixture` (of one rank)."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"vocab_size": 512, "num_key_value_heads": 4}  # no padding, which differs between layouts
    models = {
        "dense": make_model(folder / "models" / "dense", "llama", tied=True, **sizes),
        "mixture": make_model(folder / "models" / "mixture", "qwen3_moe", tied=False, **sizes),
    }
    jobs = [
        {"model": models[kind], "policy": policy, "trajectories": some_trajectories(), "save": folder / name / "ours",
         "rival": folder / name / "megatrons"}
        for name, (kind, policy) in LAYOUTS.items()
    ]  # fmt: skip
    last = []
    for kind, (first, *others) in (("dense", DENSE), ("mixture", MIXTURE)):
        source = folder / first / "ours"
        for name in others:
            target = folder / name / "after"
            jobs.append({"model": models[kind], "policy": LAYOUTS[name][1], "load": source, "save": target})
            source = target
        last.append({"model": models[kind], "policy": {}, "load": source, "save": folder / kind})
    run_ranks(4, ON_RANKS, "in_turn", jobs)
    run_ranks(1, ON_RANKS, "in_turn", last)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(folder / "weights")
    described = reader.read_metadata().state_dict_metadata
    found = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in described.items() if isinstance(m, TensorStorageMetadata)}
    _load_state_dict(found, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    return found


def assert_same_tensors(left: Path, right: Path) -> None:
    ours, theirs = _tensors(left), _tensors(right)
    assert ours.keys() == theirs.keys() and any(key.startswith("optimizer.state.exp_avg_sq.") for key in ours)
    for key, tensor in ours.items():
        other = theirs[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        assert torch.equal(tensor, other), f"{key} differs"


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_what_megatron_would_have_saved(saved, name):
    ours, theirs = saved / name / "ours", saved / name / "megatrons"
    assert_same_tensors(ours, theirs)
    described = [FileSystemReader(each / "weights").read_metadata().state_dict_metadata for each in (ours, theirs)]
    assert described[0].keys() == described[1].keys(), "objects beside the tensors"
    assert torch.load(ours / "weights" / "common.pt") == torch.load(theirs / "weights" / "common.pt")
    assert json.loads((ours / "weights" / "metadata.json").read_text()) == json.loads((theirs / "weights" / "metadata.json").read_text())


@pytest.mark.parametrize("kind, chain", [("dense", DENSE), ("mixture", MIXTURE)])
def test_weights_and_optimiser_state_come_through_every_layout_bit_for_bit(saved, kind, chain):
    for name in chain[1:]:
        assert_same_tensors(saved / chain[0] / "ours", saved / name / "after")
    assert_same_tensors(saved / chain[0] / "ours", saved / kind)


def test_data_parallel_ranks_write_equally_much(saved):
    sizes = [file.stat().st_size for file in (saved / "data 4" / "ours" / "weights").glob("*.distcp")]
    assert len(sizes) == 4 and max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("layout, precision", [("tensor 2, data 2, bf16", "bf16"), ("data 4", "fp32")])
def test_a_checkpoint_takes_the_room_that_is_asked_for(saved, layout, precision):
    tensors = _tensors(saved / layout / "ours")
    [model] = (saved / "models").glob("dense")
    rooms = {"run": {"dir": saved / "run"}, "corpus": {"path": "/"}, "policy": {"model": model, "precision": precision}}
    config, architecture = Config.model_validate({**rooms, "checkpoint": {"keep": 3}}), read_architecture(model)
    one = sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint_room.checkpoint_bytes(config, architecture) == pytest.approx(one, rel=0.01)
    text, problem = checkpoint_room.describe(config, architecture)
    assert "checkpoint.keep=3" in text and problem is None


@pytest.mark.parametrize("free, told, refused", [(0.5, "", "a checkpoint takes"), (2.5, "give checkpoint.keep=1", None)])
def test_too_little_room_is_said_before_a_run_starts(saved, monkeypatch, free, told, refused):
    config = Config.model_validate({"run": {"dir": saved / "run"}, "corpus": {"path": "/"}, "policy": {"model": saved}})
    architecture = read_architecture(saved / "models" / "dense")
    size = int(free * checkpoint_room.checkpoint_bytes(config, architecture))
    monkeypatch.setattr(checkpoint_room.os, "statvfs", lambda path: SimpleNamespace(f_bavail=size, f_frsize=1))
    text, problem = checkpoint_room.describe(config, architecture)
    assert told in text
    assert problem is None if refused is None else refused in problem and f"run.dir={saved / 'run'}" in problem

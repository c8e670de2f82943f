"""A checkpoint is free of the layout that wrote it: what one layout wrote, the next loads bit for bit, and so do the
converter's way out and its way in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversions import to_hf, to_torch_dist
from hf_folders import assert_same_model
from ranks import run_ranks
from safetensors.torch import load_file
from small_models import make_model

from megatron_spice.checkpoint import hf_files

ON_RANKS = Path(__file__).parents[1] / "policy" / "on_ranks.py"

DENSE = {
    "uneven pipeline": {"pipeline_parallel_size": 4},
    "virtual pipeline": {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "pipeline_layers": [2, 1, 1, 1]},
    "tensor 2, pipeline 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "pipeline_layers": [1, 4]},
}
MIXTURE = {
    "expert 4": {"expert_parallel_size": 4},
    "tensor 2, expert 2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "virtual pipeline, expert 2": {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "expert_parallel_size": 2},
    "tensor 4, one expert rank": {"tensor_parallel_size": 4},
}
CONVERTED = [("dense", "tensor 2, pipeline 2"), ("mixture", "virtual pipeline, expert 2")]
CASES = [("dense", name) for name in DENSE] + [("mixture", name) for name in MIXTURE]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_key_value_heads": 4}
    return {
        "dense": make_model(folder / "dense", "llama", tied=True, num_hidden_layers=5, **sizes),
        "mixture": make_model(folder / "mixture", "qwen3_moe", tied=False, **sizes),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each layout saves, in a folder of its kind and name."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def loaded(models, folder):
    """What each layout has after loading what the layout before it in the list saved; and some of them what was converted."""
    jobs, names = [], []
    for kind, layouts in (("dense", DENSE), ("mixture", MIXTURE)):
        for name, degrees in layouts.items():
            target = str(folder / kind / name)
            jobs.append({"model": models[kind], "overrides": {"policy": degrees}, "save": target})
            hf_files.copy_small_files(models[kind], Path(target) / "hf")
        order = list(layouts)
        for name, writer in zip(order, order[-1:] + order[:-1]):
            source = str(folder / kind / writer)
            job = {"model": models[kind], "overrides": {"policy": layouts[name]}, "load": source}
            jobs.append({**job, "gather": True})
            names.append((kind, name))
    for kind, name in CONVERTED:
        source = str(to_torch_dist(models[kind], folder / "converted" / kind))
        degrees = (DENSE | MIXTURE)[name]
        jobs.append({"model": models[kind], "overrides": {"policy": degrees}, "load": source, "with_optimizer": False, "gather": True})
        names.append((kind, f"converted, {name}"))
    results = [result["weights"] for result in run_ranks(4, ON_RANKS, "in_layouts", jobs)[0] if "weights" in result]
    return dict(zip(names, results))


def assert_same_weights(loaded, models, kind, name):
    weights = {tensor: torch.from_numpy(array) for tensor, array in loaded[kind, name].items()}
    source = load_file(models[kind] / "model.safetensors")
    assert weights.keys() == source.keys()
    assert [tensor for tensor in source if not torch.equal(weights[tensor], source[tensor])] == []


@pytest.mark.parametrize("kind, name", CASES)
def test_a_layout_loads_what_another_wrote(loaded, models, kind, name):
    assert_same_weights(loaded, models, kind, name)


@pytest.mark.parametrize("kind, name", CONVERTED)
def test_a_layout_loads_what_the_converter_wrote(loaded, models, kind, name):
    assert_same_weights(loaded, models, kind, f"converted, {name}")


@pytest.mark.parametrize("kind, name", CASES)
def test_the_converter_reads_what_a_layout_wrote_with_its_optimiser(loaded, models, folder, tmp_path, kind, name):
    assert_same_model(models[kind], to_hf(folder / kind / name, tmp_path / "back"))

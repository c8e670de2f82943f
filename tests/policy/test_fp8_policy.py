"""The whole policy in emulated FP8: close to bf16 within stated bounds, the same in layouts that cut no block, and audited."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("on_ranks.py")
IDS = [7, 3, 150, 202, 9, 9, 41, 0, 77, 121, 5]
TRAJECTORIES = some_trajectories()
FP8 = {"precision": "fp8", "adam_eps": 1e-3}
RECIPES = {
    "blockwise": FP8,
    "hybrid": FP8 | {"fp8": {"format": "hybrid"}},
    "tensorwise": FP8 | {"fp8": {"recipe": "tensorwise"}},
    "outer layers in bf16": FP8 | {"fp8": {"first_layers_bf16": 1, "last_layers_bf16": 1}},
    "full recompute": FP8 | {"recompute": "full"},
}
# ranks, degrees: none of them cuts a matrix, so every block is the same
LAYOUTS = [
    (2, {"pipeline_parallel_size": 2}),
    (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    (2, {"expert_parallel_size": 2}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "qwen3_moe", tied=False)


def _job(model: Path, settings: dict) -> dict:
    return {"model": model, "overrides": {"policy": settings}, "score": IDS, "trajectories": TRAJECTORIES, "updates": 2,
            "audit": True}  # fmt: skip


@pytest.fixture(scope="module")
def results(model: Path) -> dict[str, dict]:
    settings = {"bf16": {"precision": "bf16", "adam_eps": 1e-3}, "fp32": {"adam_eps": 1e-3}, **RECIPES}
    return dict(zip(settings, run_ranks(1, ON_RANKS, "in_layouts", [_job(model, each) for each in settings.values()])[0]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(results, recipe):
    """A random model of 4 layers, worse than a trained one: every layer's output is noise of full size."""
    fp8, bf16 = results[recipe], results["bf16"]
    difference = (torch.tensor(fp8["score"]) - torch.tensor(bf16["score"])).abs()
    assert 1e-4 < difference.mean() < 0.3, "0 would mean that nothing ran in FP8"
    for update, expected in zip(fp8["updates"], bf16["updates"]):
        assert update["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=0.25)
        assert update["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=0.05)


def test_bf16_is_near_fp32(results):
    """What the bound above is to be compared with."""
    difference = (torch.tensor(results["fp32"]["score"]) - torch.tensor(results["bf16"]["score"])).abs()
    assert 0 < difference.mean() < 0.1


def test_recomputation_changes_nothing(results):
    assert results["full recompute"]["updates"] == results["blockwise"]["updates"]


@pytest.mark.parametrize("ranks, degrees", LAYOUTS)
def test_layouts_that_cut_no_block_agree(results, model, ranks, degrees):
    [[result], *_] = run_ranks(ranks, ON_RANKS, "in_layouts", [_job(model, FP8 | degrees)])
    assert result["score"] == pytest.approx(results["blockwise"]["score"], abs=1e-5)
    for update, expected in zip(result["updates"], results["blockwise"]["updates"]):
        assert update["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-3)


def test_the_audit_says_what_ran(results):
    text = "\n".join(results["outer layers in bf16"]["audit"])
    assert "NOT AS SET" not in text
    lines = {line.split()[0]: line for line in results["outer layers in bf16"]["audit"]}
    assert " fp8 " in lines["decoder.layers.1-2.self_attention.linear_qkv"]
    assert "first_layers_bf16=1" in text and "last_layers_bf16=1" in text
    assert not any(" fp8 " in line for line in results["bf16"]["audit"])

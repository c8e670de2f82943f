"""Any layout computes the same: Hugging Face's log-probabilities, one loss, one gradient, the same weights after three steps.

All in float32 on gloo. Every layout runs every family that fits it. What must not matter besides runs with one family:
small rows in every layout, other rows and recomputation in one of each kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("on_ranks.py")
IDS = [7, 3, 150, 202, 9, 9, 41, 0, 77, 121, 5]
TRAJECTORIES = some_trajectories()
STEPS = 3

DENSE = ["llama-tied", "llama", "qwen2-tied", "qwen3"]
MODELS = {
    "llama-tied": dict(family="llama", tied=True),
    "llama": dict(family="llama", tied=False),
    "qwen2-tied": dict(family="qwen2", tied=True),
    "qwen3": dict(family="qwen3", tied=False),
    "qwen3_moe": dict(family="qwen3_moe", tied=False),
    "llama-5-layers": dict(family="llama", tied=True, num_hidden_layers=5),
}
MODELS |= {f"{name}-4-groups": {**MODELS[name], "num_key_value_heads": 4} for name in [*DENSE, "qwen3_moe"]}
ALL = [*DENSE, "qwen3_moe"]
MOE = ["qwen3_moe"]

TP2, TP4 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
PP2, PP4 = {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 4}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
EP2, EP4 = {"expert_parallel_size": 2}, {"expert_parallel_size": 4}
VP2 = {"virtual_pipeline_size": 2}
NO_SP = {"sequence_parallel": False}
# name -> (ranks, policy settings, models)
LAYOUTS = {
    "one": (1, {}, list(MODELS)),
    "tp2": (2, TP2 | NO_SP, DENSE),
    "tp2+sp": (2, TP2, ALL),
    "pp2": (2, PP2, ALL),
    "pp2 uneven": (2, PP2 | {"pipeline_layers": [1, 3]}, ALL),
    "pp2 vp2": (2, PP2 | VP2, ALL),
    "pp2 vp2 uneven": (2, PP2 | VP2, ["llama-5-layers"]),
    "cp2": (2, CP2, ALL),
    "dp2": (2, {}, ALL),
    "ep2": (2, EP2, MOE),
    "tp4+sp": (4, TP4, [f"{name}-4-groups" for name in ALL]),
    "pp4": (4, PP4, ALL),
    "pp4 uneven": (4, PP4, ["llama-5-layers"]),
    "cp4": (4, CP4, ALL),
    "dp4": (4, {}, ALL),
    "tp2 pp2": (4, TP2 | PP2 | NO_SP, DENSE),
    "tp2+sp pp2": (4, TP2 | PP2, ALL),
    "tp2+sp pp2 vp2": (4, TP2 | PP2 | VP2, ALL),
    "tp2+sp cp2": (4, TP2 | CP2, ALL),
    "tp2+sp dp2": (4, TP2, ALL),
    "pp2 cp2": (4, PP2 | CP2, ALL),
    "pp2 dp2": (4, PP2, ALL),
    "pp2 vp2 cp2": (4, PP2 | VP2 | CP2, DENSE[:1]),
    "pp2 vp2 dp2": (4, PP2 | VP2, DENSE[:1]),
    "cp2 dp2": (4, CP2, ALL),
    "ep4": (4, EP4, MOE),
    "ep2 dp4": (4, EP2, MOE),
    "ep2 pp2": (4, EP2 | PP2, MOE),
    "ep2 tp2+sp": (4, EP2 | TP2, MOE),
    "ep4 tp2+sp": (4, EP4 | TP2, MOE),
    "ep2 cp2": (4, EP2 | CP2, MOE),
    "ep2 pp2 vp2": (4, EP2 | PP2 | VP2, MOE),
}
CASES = [(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]

VARIANT_MODEL = "llama-tied"
VARIANTS = {
    "small rows": {"tokens_per_microbatch": 24},
    "one row": {"tokens_per_microbatch": 4096},
    "unshared": {"shared_prefix": False},
    "sequence lengths": {"shared_prefix": False, "tokens_per_microbatch": 50},
    "full recompute": {"recompute": "full"},
    "recomputed attention": {"recompute": "selective"},
    "penalty": {"kl_coefficient": 0.5},
}
OF_EACH_KIND = {"one", "tp2+sp", "pp2", "pp2 vp2", "cp2", "dp2", "tp2+sp pp2", "tp2+sp cp2", "pp2 cp2"}
VARIANT_CASES = [
    (layout, variant) for layout, (_, _, models) in LAYOUTS.items() for variant in VARIANTS
    if VARIANT_MODEL in models and (layout in OF_EACH_KIND or variant == "small rows")
]  # fmt: skip
JOBS_A_START = 40


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp("model") / "hf", **options) for name, options in MODELS.items()}


@pytest.fixture(scope="session")
def results(models: dict[str, Path]) -> dict[tuple[str, str, str | None], dict]:
    """(layout, model, variant) -> what rank 0 saw; one start of the ranks for many jobs of a size."""
    found = {}
    for size in (1, 2, 4):
        keys = [(layout, model, None) for layout, model in CASES if LAYOUTS[layout][0] == size]
        keys += [(layout, VARIANT_MODEL, variant) for layout, variant in VARIANT_CASES if LAYOUTS[layout][0] == size]
        keys.sort(key=lambda key: str(sorted(LAYOUTS[key[0]][1].items())))  # jobs of a layout share its process groups
        jobs = [_job(models[model], LAYOUTS[layout][1], variant) for layout, model, variant in keys]
        for start in range(0, len(jobs), JOBS_A_START):
            part = slice(start, start + JOBS_A_START)
            found.update(zip(keys[part], run_ranks(size, ON_RANKS, "in_layouts", jobs[part])[0]))
    return found


def _job(model: Path, layout: dict, variant: str | None) -> dict:
    # With a large eps Adam's step is smooth in the gradient: with a small one it is the gradient's sign, which for a
    # gradient that is rounding noise around zero may be either.
    settings = {**layout, **VARIANTS.get(variant, {}), "adam_eps": 1e-3}
    return {"model": model, "overrides": {"policy": settings}, "score": IDS, "trajectories": TRAJECTORIES, "updates": STEPS,
            "gather": True, "sequences": variant == "sequence lengths"}  # fmt: skip


pytestmark = pytest.mark.timeout(900)  # the first test waits for all ranks


@pytest.mark.parametrize("layout, model", CASES)
def test_log_probabilities_are_transformers(results, models, layout, model):
    ours = torch.tensor(results[layout, model, None]["score"])
    assert (ours - _transformers_logprobs(models[model])).abs().max() < 1e-4


@pytest.mark.parametrize("layout, model", CASES)
def test_three_steps_are_the_same_in_every_layout(results, layout, model):
    _check_same(results[layout, model, None], results["one", model, None])


@pytest.mark.parametrize("layout, variant", VARIANT_CASES)
def test_rows_sharing_and_recomputation_change_nothing(results, layout, variant):
    _check_same(results[layout, VARIANT_MODEL, variant], results["one", VARIANT_MODEL, None if variant != "penalty" else variant])


def _check_same(result: dict, reference: dict) -> None:
    assert len(result["updates"]) == len(reference["updates"]) == STEPS
    for update, expected in zip(result["updates"], reference["updates"]):
        assert expected["policy/grad_norm"] > 0.01
        assert update.keys() == expected.keys()
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "drift/mean", "policy/completion_tokens", "policy/kl"):
            if name in expected:
                assert update[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    assert result["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        assert np.abs(result["weights"][name] - weight).max() <= 1e-4 * np.abs(weight).max(), name


def _transformers_logprobs(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def test_three_steps_move_every_weight(results, models):
    """Otherwise equal weights would prove little."""
    from safetensors.torch import load_file

    for name in ALL:
        before = load_file(models[name] / "model.safetensors")
        for weight, after in results["one", name, None]["weights"].items():
            assert np.abs(after - before[weight].numpy()).max() > 1e-3 * np.abs(after).max(), f"{name}: {weight}"


def test_sharing_saves_tokens(results):
    shared, unshared = (results["one", VARIANT_MODEL, name]["updates"][0] for name in (None, "unshared"))
    assert shared["policy/tokens"] < unshared["policy/tokens"]
    assert shared["policy/prefix_saving"] == pytest.approx(unshared["policy/tokens"] / shared["policy/tokens"])

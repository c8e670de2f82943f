"""The optimiser is told what the recipe says, and steps alike wherever its state lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("memory_on_ranks.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3") / "hf", "qwen3", tied=True)


def test_an_offloaded_optimizer_takes_the_same_steps_and_is_saved_and_loaded(model, tmp_path):
    jobs = []
    for number, (fraction, sleep) in enumerate([(0.0, "gradients"), (0.5, "gradients"), (1.0, "all")]):
        folder = tmp_path / str(number) / "weights"
        folder.mkdir(parents=True)
        jobs.append(("offloaded", {"model": model, "trajectories": some_trajectories(), "folder": folder,
                                   "optimizer_offload": fraction, "sleep": sleep}))  # fmt: skip
    on_device, half, whole = run_ranks(2, ON_RANKS, "in_turn", jobs)[0]
    assert on_device["offloaded"][0] == 0
    assert whole["offloaded"][0] == whole["offloaded"][1]
    assert 0.5 <= half["offloaded"][0] / half["offloaded"][1] < 1
    for offloaded in (half, whole):
        for update, expected in zip(offloaded["updates"], on_device["updates"]):
            assert update["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-5)
        for name, weight in on_device["weights"].items():
            # Torch's fused Adam may round otherwise than its plain one: here and there the last bit of a bfloat16.
            assert (offloaded["weights"][name] != weight).mean() < 1e-2, name
            np.testing.assert_allclose(offloaded["weights"][name], weight, rtol=2**-7, err_msg=name)


def test_offloading_without_a_gpu_is_refused(model):
    job = {"model": model, "precision": "bf16", "optimizer_offload": 0.5}
    with pytest.raises(AssertionError, match="policy.optimizer_offload=0.5.*without a GPU"):
        run_ranks(1, ON_RANKS, "in_turn", [("optimizer_config", job)])


@pytest.fixture(scope="module")
def told(model, tmp_path_factory) -> dict[str, dict]:
    """What Megatron was told by several recipes; one start of the ranks for all."""
    mixture = make_model(tmp_path_factory.mktemp("qwen3_moe") / "hf", "qwen3_moe", tied=False)
    jobs = {
        "fp32": {"model": model, "weight_decay": 0.1},
        "bf16": {"model": model, "precision": "bf16"},
        "blockwise": {"model": model, "precision": "fp8"},
        "tensorwise": {"model": model, "precision": "fp8", "fp8": {"recipe": "tensorwise", "format": "hybrid"}},
        "experts": {"model": mixture, "expert_parallel_size": 2},
    }
    answers = run_ranks(2, ON_RANKS, "in_turn", [*(("optimizer_config", job) for job in jobs.values()), ("fused_parts", {})])
    return dict(zip([*jobs, "fused_parts"], answers[0]))


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_the_fp8_recipe_reaches_the_optimizer(told, recipe):
    assert told[recipe]["fp8_recipe"] == told[recipe]["model_recipe"] == recipe
    assert told[recipe]["types"] == (True, "torch.bfloat16")


def test_no_recipe_is_named_without_fp8(told):
    assert told["bf16"]["fp8_recipe"] is None and told["bf16"]["types"] == (True, "torch.bfloat16")
    assert told["fp32"]["fp8_recipe"] is None and told["fp32"]["types"] == (False, "torch.float32")


def test_weight_decay_spares_norms_and_biases(told):
    decays = {decay for _, decay, _ in told["fp32"]["groups"]}
    assert decays == {0.0, 0.1}
    for sizes, decay, rate in told["fp32"]["groups"]:
        assert rate == 1e-2
        assert decay or max(sizes) <= 64, "only vectors are spared"


def test_experts_that_are_shared_out_have_an_optimizer_of_their_own(told):
    assert told["experts"]["parts"] == 2 and told["fp32"]["parts"] == 1


def test_fused_parts_are_apexs_then_transformer_engines_then_torchs(told):
    found = told["fused_parts"]
    assert found["here"] == found["wrong_apex"] == "torch"
    assert found["described"] == "Adam by torch, weight gradients not fused"
    assert found["with_apex"] == ("apex", True)
    assert found["settings"] == [False] * 4
    assert found["engine_layers"] == 1 and found["fused"] == (True, False)

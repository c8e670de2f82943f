"""The optimiser is told what the recipe says, and steps alike wherever its state lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("memory_on_ranks.py")
# What appears among the modules, one after the other, as files. An Apex built without CUDA extensions has no kernels (amp_C).
APEX_ADAM = "import torch\n\nclass FusedAdam(torch.optim.AdamW):\n    pass\n"
STAND_INS = {
    "PyPI's apex": {"apex/__init__.py": ""},
    "an Apex without kernels": {
        "apex/__init__.py": "", "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam\n",
        "apex/optimizers/fused_adam.py": APEX_ADAM,
    },
    "Apex": {"amp_C.py": ""},
    "Apex's gradient kernel": {"fused_weight_gradient_mlp_cuda.py": ""},
}  # fmt: skip


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


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """STAND_INS as files, each in a folder of its own."""
    folders = {name: tmp_path_factory.mktemp("modules") for name in STAND_INS}
    for name, files in STAND_INS.items():
        for path, text in files.items():
            (folders[name] / path).parent.mkdir(parents=True, exist_ok=True)
            (folders[name] / path).write_text(text)
    return folders


@pytest.fixture(scope="module")
def told(model, stand_ins, tmp_path_factory) -> dict[str, dict]:
    """What Megatron was told by several recipes; one start of the ranks for all."""
    mixture = make_model(tmp_path_factory.mktemp("qwen3_moe") / "hf", "qwen3_moe", tied=False)
    jobs = {
        "fp32": {"model": model, "weight_decay": 0.1},
        "bf16": {"model": model, "precision": "bf16"},
        "blockwise": {"model": model, "precision": "fp8"},
        "tensorwise": {"model": model, "precision": "fp8", "fp8": {"recipe": "tensorwise", "format": "hybrid"}},
        "experts": {"model": mixture, "expert_parallel_size": 2},
    }
    others = {
        "offloaded": ("refusal", {"model": model, "precision": "bf16", "optimizer_offload": 0.5}),
        "fused_parts": ("fused_parts", {}),
        "fused_choices": ("fused_choices", {"folders": stand_ins}),
    }
    answers = run_ranks(2, ON_RANKS, "in_turn", [*(("optimizer_config", job) for job in jobs.values()), *others.values()])
    return dict(zip([*jobs, *others], answers[0], strict=True))


def test_offloading_without_a_gpu_is_refused(told):
    assert "policy.optimizer_offload=0.5" in told["offloaded"] and "without a GPU" in told["offloaded"]


@pytest.mark.parametrize("recipe, rounding", [("blockwise", (False, "e4m3")), ("tensorwise", (True, "e5m2"))])
def test_the_fp8_recipe_reaches_the_optimizer_and_the_layers(told, recipe, rounding):
    """The optimiser's config has its name. The model's has not: on a CPU the layers emulate it, and Megatron, told of FP8,
    would call Transformer Engine."""
    assert told[recipe]["fp8_recipe"] == recipe and told[recipe]["roundings"] == {rounding}
    assert told[recipe]["types"] == (True, "torch.bfloat16")
    assert told[recipe]["model"] == told["bf16"]["model"]


def test_no_recipe_is_named_without_fp8(told):
    for precision, types in (("bf16", (True, "torch.bfloat16")), ("fp32", (False, "torch.float32"))):
        assert told[precision]["fp8_recipe"] is None and told[precision]["types"] == types
        fp8, _, *of_model = told[precision]["model"]
        assert fp8 is None and tuple(of_model) == types and not told[precision]["roundings"]


def test_weight_decay_spares_norms_and_biases(told):
    decays = {decay for _, decay, _ in told["fp32"]["groups"]}
    assert decays == {0.0, 0.1}
    for sizes, decay, rate in told["fp32"]["groups"]:
        assert rate == 1e-2
        assert decay or max(sizes) <= 64, "only vectors are spared"


def test_experts_that_are_shared_out_have_an_optimizer_of_their_own(told):
    assert told["experts"]["parts"] == 2 and told["fp32"]["parts"] == 1


def test_without_anything_fused_it_is_torchs_adam(told):
    found = told["fused_parts"]
    assert found["here"]["adam"] == "torch"
    assert found["described"] == "Adam by torch, weight gradients not fused"
    assert found["engine_layers"] == 1 and found["fused"] == (True, False)


@pytest.mark.parametrize("engine", [True, False])
def test_fused_parts_are_apexs_then_transformer_engines_then_torchs(told, stand_ins, engine):
    """With Transformer Engine in a process of its own, since Megatron chooses when it is imported. Weight gradients are fused
    only on a GPU, without Transformer Engine's layers, and by a kernel that Apex's Adam can do without."""
    found = told["fused_choices"]
    if engine:
        [found] = run_ranks(1, ON_RANKS, "fused_choices_with_engine", stand_ins, fresh=True)
    without = "transformer_engine" if engine else "torch"
    assert {name: choice["adam"] for name, choice in found.items()} == {
        "nothing more": without, "PyPI's apex": without, "an Apex without kernels": without, "Apex": "apex",
        "Apex's gradient kernel": "apex",
    }  # fmt: skip
    for choice in found.values():
        assert {module.split(".")[0] for module in choice["classes"]} == {choice["adam"]}
    *others, last = found.values()
    assert all(choice["fusion"] == [False] * 4 for choice in others)
    assert last["fusion"] == [False, False, True, False]
    engines = "fused by Transformer Engine"
    assert last["described"] == [
        f"Adam by Apex, weight gradients {how}" for how in ("not fused", engines, "fused by Apex", engines)
    ]
    name = "Transformer Engine" if engine else "torch"
    assert found["nothing more"]["described"][2] == f"Adam by {name}, weight gradients not fused"

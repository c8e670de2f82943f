"""The whole policy in emulated FP8: near bf16 within stated bounds, the same in layouts that cut no matrix, near where one is
cut, and audited.

Two models: a mixture of experts 64 wide, in which every block is a partial one, and a dense one 256 wide, in which blocks of
128 x 128 are whole, also in halves of its matrices. Bounds on the wide model are about what was measured (in brackets) with
room for another machine's sums, which make other numbers tip over to the next FP8 one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small_models import make_model, some_trajectories

from megatron_spice.policy.packing import make_blocks, num_tokens, pack_rows, plan_rows

ON_RANKS = Path(__file__).with_name("fp8_on_ranks.py")
IDS = [7, 3, 150, 202, 9, 9, 41, 0, 77, 121, 5]
TRAJECTORIES = some_trajectories()
FP8 = {"precision": "fp8", "adam_eps": 1e-3}
OUTER = {"fp8": {"first_layers_bf16": 1, "last_layers_bf16": 1}}
RECIPES = {
    "blockwise": FP8,
    "hybrid": FP8 | {"fp8": {"format": "hybrid"}},
    "tensorwise": FP8 | {"fp8": {"recipe": "tensorwise"}},
    "outer layers in bf16": FP8 | OUTER,
    "full recompute": FP8 | {"recompute": "full"},
}
TP2, CP2, PP2 = {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {"pipeline_parallel_size": 2}
VP2 = PP2 | {"virtual_pipeline_size": 2}
# Rows are what blocks of tokens are cut from. Two data-parallel ranks pack them otherwise than one, unless a row holds one group;
# and experts see the tokens of both ranks' rows, unless there is one group in all.
ONE_GROUP = [each for each in TRAJECTORIES if each.prompt_ids == next(each.prompt_ids for each in TRAJECTORIES if each.advantage)]
APART = {"tokens_per_microbatch": 28}
# none of them cuts a matrix, so every block is the same
LAYOUTS = {"pp2": PP2, "pp2 vp2": VP2, "ep2": {"expert_parallel_size": 2}}

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.075,
}  # fmt: skip
MANY = some_trajectories(groups=10)
ROW = 32  # tokens a row where there are two ranks
# Adam's first step is lr / eps times the gradient, here so large that the weights before it and bf16's rounding do not count.
WIDE = {"precision": "fp8", "adam_eps": 1e6, "learning_rate": 1e12, "clip_grad": 1e9, "tokens_per_microbatch": 4096}
WIDE_ALONE = {
    "fp32": WIDE | {"precision": "fp32"},
    "bf16": WIDE | {"precision": "bf16"},
    **{recipe: WIDE | {"fp8": RECIPES[recipe].get("fp8", {})} for recipe in ("blockwise", "hybrid", "tensorwise")},
    "rows": WIDE | {"tokens_per_microbatch": ROW},
    "rows in float32": WIDE | {"tokens_per_microbatch": ROW},
    "rows apart": WIDE | APART,
    "outer layers in bf16": WIDE | OUTER | {"tokens_per_microbatch": ROW},
}
CUT = {"tp2+sp": TP2, "tp2": TP2 | {"sequence_parallel": False}, "cp2": CP2}
WIDE_TOGETHER = {
    **{name: WIDE | layout | {"tokens_per_microbatch": ROW} for name, layout in CUT.items()},
    **{f"{name} in float32": WIDE | layout | {"tokens_per_microbatch": ROW} for name, layout in CUT.items()},
    "dp2": WIDE | APART,
    "pp2 vp2": WIDE | OUTER | VP2 | {"tokens_per_microbatch": ROW},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "qwen3_moe", tied=False)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "hf", "llama", tied=True, **SIZES)


def _job(model: Path, settings: dict, trajectories: list) -> dict:
    return {"model": model, "overrides": {"policy": settings}, "score": IDS, "trajectories": trajectories, "updates": 2,
            "audit": True}  # fmt: skip


def _wide_job(model: Path, name: str, settings: dict) -> dict:
    return {"model": model, "overrides": {"policy": settings}, "score": IDS, "trajectories": MANY, "updates": 1,
            "gather": True, "audit": True, "float32": "float32" in name}  # fmt: skip


@pytest.fixture(scope="module")
def alone(model: Path, wide_model: Path) -> dict[str, dict[str, dict]]:
    """What one rank computes, with each model."""
    settings = {"bf16": {"precision": "bf16", "adam_eps": 1e-3}, "fp32": {"adam_eps": 1e-3}, "one group": FP8, **RECIPES}
    jobs = {("mixture", name): _job(model, each, ONE_GROUP if name == "one group" else TRAJECTORIES) for name, each in settings.items()}
    jobs |= {("wide", name): _wide_job(wide_model, name, each) for name, each in WIDE_ALONE.items()}
    return _by_model(jobs, run_ranks(1, ON_RANKS, "policies", list(jobs.values()))[0])


@pytest.fixture(scope="module")
def together(model: Path, wide_model: Path) -> dict[str, dict[str, tuple[dict, ...]]]:
    """What each of two ranks saw."""
    jobs = {
        ("mixture", name): _job(model, FP8 | degrees, ONE_GROUP if name == "ep2" else TRAJECTORIES)
        for name, degrees in LAYOUTS.items()
    }
    jobs |= {("wide", name): _wide_job(wide_model, name, each) for name, each in WIDE_TOGETHER.items()}
    return _by_model(jobs, list(zip(*run_ranks(2, ON_RANKS, "policies", list(jobs.values())))))


def _by_model(jobs: dict[tuple[str, str], dict], results: list) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (kind, name), result in zip(jobs, results, strict=True):
        found.setdefault(kind, {})[name] = result
    return found


# -- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(alone, recipe):
    """A random model of 4 layers, worse than a trained one: every layer's output is noise of full size."""
    fp8, bf16 = alone["mixture"][recipe], alone["mixture"]["bf16"]
    assert 1e-4 < _apart(fp8, bf16) < 0.3, "0 would mean that nothing ran in FP8"
    for update, expected in zip(fp8["updates"], bf16["updates"]):
        assert update["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=0.25)
        assert update["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=0.05)


def test_bf16_is_near_fp32(alone):
    """What the bound above is to be compared with."""
    assert 0 < _apart(alone["mixture"]["fp32"], alone["mixture"]["bf16"]) < 0.1


def test_recomputation_changes_nothing(alone):
    assert alone["mixture"]["full recompute"]["updates"] == alone["mixture"]["blockwise"]["updates"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_cut_no_block_agree(alone, together, layout):
    result, expected = together["mixture"][layout][0], alone["mixture"]["one group" if layout == "ep2" else "blockwise"]
    assert result["score"] == pytest.approx(expected["score"], abs=1e-5)
    for update, wanted in zip(result["updates"], expected["updates"]):
        assert update["policy/grad_norm"] == pytest.approx(wanted["policy/grad_norm"], rel=1e-3)


def test_the_audit_says_what_ran(alone):
    audit = alone["mixture"]["outer layers in bf16"]["audit"]
    text, lines = "\n".join(audit), {line.split()[0]: line for line in audit}
    assert "NOT AS SET" not in text
    assert " fp8 " in lines["decoder.layers.1-2.self_attention.linear_qkv"]
    assert "first_layers_bf16=1" in text and "last_layers_bf16=1" in text
    assert not any(" fp8 " in line for line in alone["mixture"]["bf16"]["audit"])


# -- the wide model ---------------------------------------------------------------------------------------------------


def _apart(result: dict, expected: dict) -> float:
    """Mean difference of the log-probabilities before any update."""
    return float(np.abs(np.subtract(result["score"], expected["score"])).mean())


@pytest.fixture(scope="module")
def before(wide_model: Path) -> dict[str, torch.Tensor]:
    """The weights of the wide model; bf16's rounding of them is far below what a step moves them by."""
    return load_file(wide_model / "model.safetensors")


def _moved(result: dict, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By how much an update moved each weight, as one vector."""
    return {name: (torch.from_numpy(result["weights"][name]) - weight).double().flatten() for name, weight in before.items()}


def _cosine(result: dict, expected: dict, before: dict[str, torch.Tensor]) -> float:
    """Between the steps of all weights together."""
    steps = [torch.cat(list(_moved(each, before).values())) for each in (result, expected)]
    return float(torch.nn.functional.cosine_similarity(*steps, dim=0))


def test_blocks_are_whole_and_every_rank_has_rows_that_count():
    """What the tests below would prove little without: whole blocks of tokens in the one row, several rows on each rank."""
    learned = [trajectory for trajectory in MANY if trajectory.advantage]
    [row] = pack_rows(make_blocks(learned, 4096, shared_prefix=True), 4096)
    assert num_tokens(row) > 128
    for share in plan_rows(learned, ROW, 2):
        assert len(share) >= 4 and all(num_tokens(row) > 16 for row in share)
    apart = [row for share in plan_rows(learned, APART["tokens_per_microbatch"], 2) for row in share if row]
    assert len(apart) >= 8 and all(len(row) == 1 for row in apart)


def test_the_wide_models_step_in_bf16_is_that_of_fp32(alone, before):
    """Cosine above 0.998 (0.9993): what the bounds on FP8 are to be compared with."""
    assert _cosine(alone["wide"]["bf16"], alone["wide"]["fp32"], before) > 0.998


@pytest.mark.parametrize("recipe", ["blockwise", "hybrid", "tensorwise"])
def test_a_step_in_fp8_goes_where_one_in_bf16_goes(alone, before, recipe):
    """Cosine above 0.92 (0.950 blockwise, 0.943 hybrid, 0.944 tensorwise) over all weights and above 0.87 (0.905) for each
    matrix of a layer, length within 5 % (2 %); and below 0.98, or nothing would have run in FP8."""
    fp8, bf16 = alone["wide"][recipe], alone["wide"]["bf16"]
    assert 0.92 < _cosine(fp8, bf16, before) < 0.98
    steps, wanted = _moved(fp8, before), _moved(bf16, before)
    for name in (name for name in wanted if "proj" in name):
        assert torch.nn.functional.cosine_similarity(steps[name], wanted[name], dim=0) > 0.87, name
    length, expected = (float(torch.cat(list(each.values())).norm()) for each in (steps, wanted))
    assert length == pytest.approx(expected, rel=0.05)


def test_hybrid_rounds_only_gradients_otherwise(alone, before):
    blockwise, hybrid = alone["wide"]["blockwise"], alone["wide"]["hybrid"]
    assert hybrid["score"] == blockwise["score"]
    assert _cosine(hybrid, blockwise, before) < 0.999


@pytest.mark.parametrize("layout", CUT)
def test_a_cut_matrix_is_multiplied_as_the_whole_one(alone, together, before, layout):
    """Halves have the whole matrix's blocks. Ranks add their parts up in bf16, whose rounding makes FP8 numbers tip over:
    cosine above 0.98 (0.988 tensor-parallel, 0.996 context-parallel), log-probabilities within 0.15 (0.07 and 0), both
    nearer than FP8 is to bf16 (0.950 and 0.20).

    In float32 few tip over: 0.998 (0.9995, 0.99998), 5e-3 (2e-7) and every weight's step within 0.15 (0.04) of its length.
    """
    for what, cosine, apart, off in (("", 0.98, 0.15, 0.5), (" in float32", 0.998, 5e-3, 0.15)):
        ranks, expected = together["wide"][f"{layout}{what}"], alone["wide"][f"rows{what}"]
        assert ranks[0]["digest"] == ranks[1]["digest"]
        assert _apart(ranks[0], expected) < apart, what
        assert _cosine(ranks[0], expected, before) > cosine, what
        steps, wanted = _moved(ranks[0], before), _moved(expected, before)
        for name, step in wanted.items():
            assert (steps[name] - step).norm() < off * step.norm(), f"{name}{what}"


def test_data_parallel_ranks_compute_the_same_rows(alone, together, before):
    """Nothing is cut, and each row's gradient is summed in float32: log-probabilities alike, steps to 1e-4 (0)."""
    [result, other], expected = together["wide"]["dp2"], alone["wide"]["rows apart"]
    assert result["digest"] == other["digest"] and result["score"] == expected["score"]
    steps, wanted = _moved(result, before), _moved(expected, before)
    for name, step in wanted.items():
        assert (steps[name] - step).norm() <= 1e-4 * step.norm(), name


def test_the_first_and_last_layers_of_an_interleaved_pipeline_stay_in_bf16(alone, together, before):
    """Four layers, dealt in turn: rank 0 has the model's layers 0 and 2, rank 1 its layers 1 and 3. Log-probabilities as on
    one rank to 1e-5 (0), cosine above 0.9999 (0.999999): rows are padded to one length, which blocks of tokens see."""
    first, last = together["wide"]["pp2 vp2"]
    for rank, fp8, kept, why in ((first, 2, 0, "first"), (last, 1, 3, "last")):
        linears = [line for line in rank["audit"] if ".linear_" in line]
        assert len(linears) == 8
        inner = rf"decoder\.layers\.{fp8}\.\S+ +fp8 +blockwise e4m3 +([1-9]\d*) of \1 forwards in FP8"
        outer = rf"decoder\.layers\.{kept}\.\S+ +bf16 +policy\.fp8\.{why}_layers_bf16=1 +0 of [1-9]\d* forwards in FP8"
        for pattern in (inner, outer):
            assert sum(bool(re.fullmatch(pattern, line)) for line in linears) == 4, linears
    expected = alone["wide"]["outer layers in bf16"]
    assert first["score"] == pytest.approx(expected["score"], abs=1e-5)
    assert _cosine(first, expected, before) > 0.9999
    assert _apart(expected, alone["wide"]["bf16"]) < _apart(alone["wide"]["rows"], alone["wide"]["bf16"])

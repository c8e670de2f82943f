"""Any layout computes the same: Hugging Face's log-probabilities, one loss, one gradient, the same weights after two steps.

All in float32 on gloo, against one rank and one row, in rows so small that every rank has several that count. Every layout
is compared with transformers and trained, with a dense model and a mixture where it fits both; every family in one layout of
each way to share layers out, and in tensor and pipeline ranks together. What must not matter besides (other rows, sharing) runs
with one family in one layout of each kind, recomputation in three; sharing with every family on one rank; all switches of the
loss together in each kind and in some that combine them.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import CASES, LAYOUTS, MODELS, ROW, TRAINED_CASES, VARIANT_CASES, VARIANTS, Case
from ranks import run_ranks
from small_models import VOCAB, make_model, some_trajectories

from megatron_spice.policy.packing import make_blocks, num_tokens, num_unshared_tokens, pack_rows, plan_rows

ON_RANKS = Path(__file__).with_name("on_ranks.py")
IDS = [7, 3, 150, 202, 9, 9, 41, 0, 77, 121, 5]
LONG_IDS = [(7 * index) % VOCAB for index in range(200)]  # far enough for rope scaling to show
# The engine's log-probabilities are about those of a model that knows nothing.
_RNG = random.Random(1)
TRAJECTORIES = [replace(t, logprobs=tuple(_RNG.uniform(-10, -3) for _ in t.logprobs)) for t in some_trajectories(groups=7)]
LEARNED = [trajectory for trajectory in TRAJECTORIES if trajectory.advantage]
STEPS = 2
JOBS_A_START = 30
METRICS = (
    "policy/loss", "policy/grad_norm", "policy/entropy", "policy/kl", "drift/mean", "policy/completion_tokens",
    "policy/clipped", "policy/dual_clipped", "policy/capped",
)  # fmt: skip

pytestmark = pytest.mark.timeout(1200)  # the first test waits for all ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name) / "hf", **options) for name, options in MODELS.items()}


@pytest.fixture(scope="session")
def before(models: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    from safetensors.torch import load_file

    return {name: {n: t.numpy() for n, t in load_file(folder / "model.safetensors").items()} for name, folder in models.items()}


@pytest.fixture(scope="session")
def results(models: dict[str, Path]) -> dict[Case, list[dict]]:
    """What each rank saw of every case; one start of the ranks for many jobs of a size."""
    found = {}
    for size in sorted({ranks for ranks, _, _ in LAYOUTS.values()}):
        cases = [case for case in (*CASES, *VARIANT_CASES) if LAYOUTS[case.layout][0] == size]
        cases.sort(key=lambda case: str(sorted(LAYOUTS[case.layout][1].items())))  # jobs of a layout share its process groups
        jobs = [_job(models[case.model], case) for case in cases]
        for start in range(0, len(jobs), JOBS_A_START):
            part = slice(start, start + JOBS_A_START)
            found.update(zip(cases[part], zip(*run_ranks(size, ON_RANKS, "in_layouts", jobs[part], timeout=600))))
    return found


def _job(model: Path, case: Case) -> dict:
    overrides = {"policy": {**LAYOUTS[case.layout][1], "tokens_per_microbatch": _row_tokens(case)}}
    for room, settings in VARIANTS[case.variant].items():
        overrides[room] = overrides.get(room, {}) | settings
    # With a large eps Adam's step is smooth in the gradient: with a small one it is the gradient's sign, which for a
    # gradient that is rounding noise around zero may be either.
    overrides["policy"] |= {"adam_eps": 1e-3}
    trained = case in TRAINED_CASES or case in VARIANT_CASES
    return {"model": model, "overrides": overrides, "score": _scored(case.model), "trajectories": TRAJECTORIES,
            "updates": STEPS if trained else 0, "gather": True, "sequences": case.variant == "sequence lengths"}  # fmt: skip


def _row_tokens(case: Case) -> int:
    small = case.layout != "one"
    return VARIANTS[case.variant].get("policy", {}).get("tokens_per_microbatch", ROW if small else 4096)


def _scored(model: str) -> list[int]:
    return LONG_IDS if "scaled" in model else IDS


@pytest.mark.parametrize("layout", [name for name, (ranks, _, _) in LAYOUTS.items() if ranks > 1])
def test_every_rank_has_rows_that_count(layout):
    """What the other tests would prove little without: no idle data-parallel rank, more micro-batches than stages."""
    ranks, settings, _ = LAYOUTS[layout]
    stages = settings.get("pipeline_parallel_size", 1)
    data = ranks // stages // settings.get("tensor_parallel_size", 1) // settings.get("context_parallel_size", 1)
    for share in plan_rows(LEARNED, ROW, data):
        assert sum(map(bool, share)) > stages


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_probabilities_are_transformers(results, models, case):
    ours, theirs = torch.tensor(results[case][0]["score"]), _transformers_logprobs(models[case.model], case.model)
    assert (ours - theirs).abs().max() < 1e-4


def test_rope_scaling_is_not_without_effect(results, models, tmp_path):
    """Otherwise a layout that forgot it would pass."""
    plain = make_model(tmp_path / "hf", **MODELS["llama-scaled"] | {"rope_scaling": False, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0}})  # fmt: skip
    scaled = torch.tensor(results[Case("one", "llama-scaled")][0]["score"])
    assert (scaled - _transformers_logprobs(plain, "llama-scaled")).abs().max() > 1e-2


@pytest.mark.parametrize("case", TRAINED_CASES, ids=str)
def test_two_steps_are_the_same_in_every_layout(results, before, case):
    _check_same(results, before, case, Case("one", case.model))


@pytest.mark.parametrize("case", VARIANT_CASES, ids=str)
def test_rows_sharing_recomputation_and_switches_are_the_same(results, before, case):
    variant = case.variant if case.variant == "every switch" else ""
    _check_same(results, before, case, Case("one", case.model, variant))


def _check_same(results: dict, before: dict, case: Case, reference: Case) -> None:
    """Metrics to 1e-4; every weight to 1e-4 of its size, and to 1e-3 of the way it has gone since the start."""
    result, expected = results[case][0], results[reference][0]
    assert len(result["updates"]) == len(expected["updates"]) == STEPS
    for update, wanted in zip(result["updates"], expected["updates"]):
        assert update.keys() == wanted.keys()
        assert wanted["policy/grad_norm"] > 0.01
        for name in METRICS:
            if name in wanted:
                assert update[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-7), name
    assert result["weights"].keys() == expected["weights"].keys()
    steps = {name: np.linalg.norm(weight - before[case.model][name]) for name, weight in expected["weights"].items()}
    noise = 1e-5 * np.linalg.norm(list(steps.values()))
    for name, weight in expected["weights"].items():
        difference = result["weights"][name] - weight
        assert np.abs(difference).max() <= 1e-4 * np.abs(weight).max(), name
        assert np.linalg.norm(difference) <= 1e-3 * steps[name] + noise, name


@pytest.mark.parametrize("case", [*CASES, *VARIANT_CASES], ids=str)
def test_all_ranks_agree(results, case):
    """On metrics, on the gathered weights, and on both ends of a tied embedding, bit for bit."""
    ranks = results[case]
    for rank in ranks:
        assert rank["updates"] == ranks[0]["updates"] and rank["digest"] == ranks[0]["digest"]
    ends = set().union(*(rank["embeddings"] for rank in ranks))
    tensor = LAYOUTS[case.layout][1].get("tensor_parallel_size", 1)
    assert len(ends) == (tensor if "-tied" in case.model else 0)


@pytest.mark.parametrize("case", [Case("ep2 tp2+sp on 2", "qwen3_moe"), Case("ep2 tp2+sp pp2 vp2", "qwen3_moe")], ids=str)
def test_ranks_that_are_no_copies_of_one_process_compute_the_same(results, models, before, case):
    """Whatever order their sets are in."""
    ranks = run_ranks(LAYOUTS[case.layout][0], ON_RANKS, "in_layouts", [_job(models[case.model], case)], fresh=True)
    found = {case: [result for [result] in ranks]}
    test_all_ranks_agree(found, case)
    _check_same(results | found, before, case, Case("one", case.model))


@pytest.mark.parametrize("case", TRAINED_CASES, ids=str)
def test_tokens_computed_are_those_of_the_plan(results, case):
    rows = pack_rows(make_blocks(LEARNED, _row_tokens(case), shared_prefix=True), _row_tokens(case))
    computed, unshared = sum(map(num_tokens, rows)), sum(map(num_unshared_tokens, rows))
    for update in results[case][0]["updates"]:
        assert update["policy/tokens"] == computed
        assert update["policy/prefix_saving"] == pytest.approx(unshared / computed)


def test_sharing_saves_tokens(results):
    shared, unshared = (results[Case("one", "llama-tied", name)][0]["updates"][0] for name in ("", "unshared"))
    assert shared["policy/tokens"] < unshared["policy/tokens"] and unshared["policy/prefix_saving"] == 1.0
    assert shared["policy/prefix_saving"] == pytest.approx(unshared["policy/tokens"] / shared["policy/tokens"])


@pytest.mark.parametrize("model", ["llama-tied", "qwen3_moe"])
def test_every_switch_does_something(results, model):
    *_, update = results[Case("one", model, "every switch")][0]["updates"]
    assert update["policy/optimizer_steps"] == 2 and update["policy/kl"] > 1e-3
    for name in ("policy/clipped", "policy/dual_clipped", "policy/capped"):
        assert 0 < update[name] < 1, name


def test_two_steps_move_every_weight(results, before):
    """Otherwise equal weights would prove little. Of the experts all but the few that no token is sent to."""
    for name in MODELS:
        weights = results[Case("one", name)][0]["weights"]
        still = [w for w, after in weights.items() if np.abs(after - before[name][w]).max() <= 1e-3 * np.abs(after).max()]
        experts = [weight for weight in weights if ".experts." in weight]
        assert set(still) <= set(experts) and len(still) <= 0.1 * len(experts), f"{name}: {still}"


@functools.lru_cache
def _transformers_logprobs(folder: Path, model: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([_scored(model)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]

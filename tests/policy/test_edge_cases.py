"""Batches that a run does meet, through a whole update on one and two ranks, in every kind of layout and precision: nothing
breaks, no trajectory is lost or counted twice, and weights stay as they were, to the bit, where there is nothing to learn."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small_models import VOCAB, make_model, some_trajectories

from megatron_spice.game.records import Trajectory

ON_RANKS = Path(__file__).with_name("on_ranks.py")
LENGTH = 16  # L_max: what on_ranks.py gives both roles, the longest completion there can be
# A step that is smooth in the gradient, and on which clipping has no part.
ADAM = {"adam_eps": 1e-3, "clip_grad": 1e9}


def _one(prompt: int, completion: int, advantage: float, role: str = "reasoner", seed: int = 0) -> Trajectory:
    """A trajectory by the lengths of its prompt and completion; equal seeds and lengths have equal prompts."""
    ids = random.Random(f"{prompt} {seed}").choices(range(VOCAB), k=prompt)
    rng = random.Random(f"{completion} {advantage} {role}")
    completion_ids = tuple(rng.choices(range(VOCAB), k=completion))
    logprobs = tuple(-rng.random() * 6 for _ in completion_ids)
    return Trajectory(role, tuple(ids), completion_ids, logprobs, advantage, reward=0.0)


USUAL = some_trajectories()
EMPTY = [_one(5, 0, 0.75), _one(9, 0, -0.25, "challenger"), _one(9, 0, -0.5, "challenger")]
NO_LEARNING = [dataclasses.replace(t, advantage=0.0) for t in USUAL]
# name -> (trajectories, policy settings)
CASES: dict[str, tuple[list[Trajectory], dict[str, Any]]] = {
    "usual": (USUAL, {}),
    "truncated, empty and of one token": ([_one(5, n, a) for n, a in ((LENGTH, 1.0), (0, -0.5), (1, -0.75), (1, 0.25))], {}),
    "usual and empty": (USUAL + EMPTY, {}),
    "empty in the middle": (USUAL[:4] + EMPTY + USUAL[4:], {}),
    "prompts of one token": ([_one(1, n, a) for n, a in ((4, 0.5), (1, -0.5), (7, 0.25))] + [_one(1, 3, 1.0, seed=1)], {}),
    "one token after one token": ([_one(1, 1, 1.0)], {}),
    "a group of equal rewards": ([_one(6, n, 0.0) for n in (3, 5)] + [_one(4, 2, 0.5), _one(4, 3, -0.5)], {}),
    "challengers only": ([t for t in USUAL if t.role == "challenger"], {}),
    "reasoners only": ([t for t in USUAL if t.role == "reasoner"], {}),
    "duplicates": (USUAL + USUAL, {}),
    "longer than a row": (USUAL, {"tokens_per_microbatch": 4}),
    "fewer rows than ranks": (USUAL[:1], {}),
    "challengers unweighted": (USUAL, {"role_weights": {"challenger": 0.0}}),
    "challengers without advantage": (
        [dataclasses.replace(t, advantage=0.0) if t.role == "challenger" else t for t in USUAL], {},
    ),
    "no advantage, but an entropy bonus": (NO_LEARNING + EMPTY, {"entropy_bonus": 0.1}),
    "no trajectories": ([], {}),
    "no advantage": (NO_LEARNING, {}),
    "nothing but empty completions": (EMPTY, {}),
    "empty completions and an entropy bonus": (EMPTY, {"entropy_bonus": 0.1}),
}  # fmt: skip
SILENT = list(CASES)[-4:]
# What every kind of layout and of precision meets; the first ones meet all.
FEW = [
    "usual", "truncated, empty and of one token", "one token after one token", "a group of equal rewards", "challengers only",
    "reasoners only", "fewer rows than ranks", "no trajectories", "no advantage", "nothing but empty completions",
]  # fmt: skip


class Variant(NamedTuple):
    """How a case is computed. `like`: the variant it is compared with, of the same model and precision. `norm`, `step`: how
    far the gradient's norm and every weight's step may be from it, relatively."""

    ranks: int
    settings: dict[str, Any]
    like: str = "one rank"
    model: str = "llama"
    few: bool = False
    norm: float = 1e-4
    step: float = 1e-3


TP2, CP2, PP2 = {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {"pipeline_parallel_size": 2}
# Adam's first step is lr / eps times the gradient, here so large that bf16's rounding of the weights does not count.
LOW = {"adam_eps": 1e6, "learning_rate": 1e12}
BF16, FP8 = LOW | {"precision": "bf16"}, LOW | {"precision": "fp8"}
VARIANTS = {
    "one rank": Variant(1, {}),
    "one rank, unshared": Variant(1, {"shared_prefix": False}),
    "two ranks": Variant(2, {}),
    "two ranks, unshared": Variant(2, {"shared_prefix": False}),
    "two tensor ranks": Variant(2, TP2),
    "two context ranks": Variant(2, CP2),
    "two stages": Variant(2, PP2, few=True),
    "two stages of two chunks": Variant(2, PP2 | {"virtual_pipeline_size": 2}, few=True),
    "mixture": Variant(1, {}, "mixture", "qwen3_moe", few=True),
    "mixture, two expert ranks": Variant(2, {"expert_parallel_size": 2}, "mixture", "qwen3_moe", few=True),
    "bf16": Variant(1, BF16, "bf16", few=True),
    "fp8": Variant(1, FP8, "fp8", few=True),
    # Twice what was measured in the worst case: norms of 0.008, 0.048 and 0.022, steps of 0.046, 0.23 and 0.098.
    "bf16, two tensor ranks": Variant(2, BF16 | TP2, "bf16", few=True, norm=0.02, step=0.1),
    "fp8, two tensor ranks": Variant(2, FP8 | TP2, "fp8", few=True, norm=0.1, step=0.5),
    "fp8, two context ranks": Variant(2, FP8 | CP2, "fp8", few=True, norm=0.05, step=0.2),
}
# What is compared with another case needs no more than one layout of one and of two ranks.
LAWS = ["usual and empty", "empty in the middle", "duplicates", "challengers unweighted", "challengers without advantage"]
RUNS = [
    (name, case) for name, variant in VARIANTS.items() for case in CASES
    if (case in FEW if variant.few else case not in LAWS or name in ("one rank", "two ranks"))
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_model(folder / family, family, tied=family == "llama") for family in ("llama", "qwen3_moe")}


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> case -> what every rank saw in its metrics, the digests of its weights, and the weights."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for size in (1, 2):
        jobs = {
            (variant, case): {
                "model": models[VARIANTS[variant].model], "trajectories": CASES[case][0], "updates": 1, "gather": True,
                "overrides": {"policy": {**ADAM, **VARIANTS[variant].settings, **CASES[case][1]}},
            }
            for variant, case in RUNS if VARIANTS[variant].ranks == size
        }  # fmt: skip
        if size == 1:
            jobs |= {("momentum", case): job for case, job in _momentum(models, tmp_path_factory.mktemp("saved")).items()}
        of_ranks = run_ranks(size, ON_RANKS, "in_layouts", list(jobs.values()))
        for (variant, case), *ranks in zip(jobs, *of_ranks, strict=True):
            found.setdefault(variant, {})[case] = {
                "metrics": [rank["updates"][0] for rank in ranks], "digests": {rank["digest"] for rank in ranks},
                "weights": ranks[0]["weights"],
            }  # fmt: skip
    return found


def _momentum(models: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """An update, and two that go on from it."""
    job = {"model": models["llama"], "overrides": {"policy": ADAM}, "gather": True, "updates": 1}
    return {
        "trained": {**job, "trajectories": USUAL, "save": folder / "saved"},
        "silent": {**job, "trajectories": NO_LEARNING, "load": folder / "saved"},
        "further": {**job, "trajectories": USUAL, "load": folder / "saved"},
    }


@pytest.fixture(scope="module")
def before(models: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """variant -> the weights it starts from, as its precision holds them."""
    files = {name: load_file(folder / "model.safetensors") for name, folder in models.items()}
    dtypes = {name: torch.bfloat16 if "precision" in variant.settings else torch.float32 for name, variant in VARIANTS.items()}
    return {
        name: {key: tensor.to(dtypes[name]).float().numpy() for key, tensor in files[variant.model].items()}
        for name, variant in VARIANTS.items()
    }


@pytest.mark.parametrize("variant, case", RUNS)
def test_every_number_is_one_and_the_same_on_all_ranks(results, variant, case):
    metrics, digests, weights = results[variant][case].values()
    assert all(math.isfinite(value) for value in metrics[0].values())
    assert all(other == metrics[0] for other in metrics) and len(digests) == 1
    assert all(np.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize("variant, case", [run for run in RUNS if run[1] in SILENT])
def test_nothing_to_learn_leaves_every_bit(results, before, variant, case):
    metrics, _, weights = results[variant][case].values()
    assert metrics[0]["policy/optimizer_steps"] == 0
    assert weights.keys() == before[variant].keys()
    for name, weight in before[variant].items():
        assert np.array_equal(weights[name], weight), name


@pytest.mark.parametrize("variant, case", [run for run in RUNS if run[1] not in SILENT])
def test_the_same_step_however_it_is_computed(results, before, variant, case):
    how = VARIANTS[variant]
    result, expected = results[variant][case], results[how.like][case]
    learned = [t for t in CASES[case][0] if t.advantage or "bonus" in case]
    if case == "challengers unweighted":
        learned = [t for t in learned if t.role != "challenger"]
    tokens = sum(len(t.completion_ids) for t in learned)
    assert result["metrics"][0]["policy/completion_tokens"] == tokens
    assert result["metrics"][0]["policy/grad_norm"] > 1e-3
    _check_same(result, expected, before[variant], how)


def _check_same(
    result: dict[str, Any], expected: dict[str, Any], before: dict[str, np.ndarray], how: Variant = VARIANTS["one rank"]
) -> None:
    """Loss, gradient norm and every weight's step."""
    _check_loss(result, expected, norm=how.norm)
    steps = {name: np.linalg.norm(weight - before[name]) for name, weight in expected["weights"].items()}
    # Where a gradient is zero but for rounding, as of one token's attention.
    noise = how.step / 100 * math.hypot(*steps.values())
    for name, weight in expected["weights"].items():
        assert np.linalg.norm(result["weights"][name] - weight) <= how.step * steps[name] + noise, name


def _check_loss(result: dict[str, Any], expected: dict[str, Any], factor: float = 1.0, norm: float = 1e-4) -> None:
    """Without old log-probabilities the loss has the same value in every precision."""
    for name, bound in (("policy/loss", 1e-4), ("policy/grad_norm", norm)):
        assert result["metrics"][0][name] == pytest.approx(factor * expected["metrics"][0][name], rel=bound, abs=1e-8), name


def test_precisions_are_what_they_are_called(results):
    """bf16 has bf16's weights, and fp8 those and another gradient (by 0.37 of its length)."""
    bf16, fp8 = (results[name]["usual"] for name in ("bf16", "fp8"))
    for result in (bf16, fp8):
        assert all(np.array_equal(torch.from_numpy(w).bfloat16().float(), w) for w in result["weights"].values())
    moved = {name: np.linalg.norm(weight) for name, weight in bf16["weights"].items()}
    apart = {name: np.linalg.norm(fp8["weights"][name] - weight) for name, weight in bf16["weights"].items()}
    assert 0.1 < math.hypot(*apart.values()) / math.hypot(*moved.values()) < 0.7


def test_duplicates_weigh_as_the_batch_without_them(results, before):
    of = results["one rank"]
    _check_same(of["duplicates"], of["usual"], before["one rank"])


def test_long_trajectories_are_not_cut(results, before):
    of = results["one rank"]
    _check_same(of["longer than a row"], of["usual"], before["one rank"])


def test_empty_completions_count_in_the_denominator_only(results, before):
    of = results["one rank"]
    _check_loss(of["usual and empty"], of["usual"], factor=len(USUAL) / len(USUAL + EMPTY))
    _check_same(of["empty in the middle"], of["usual and empty"], before["one rank"])


def test_a_role_of_weight_zero_teaches_nothing(results, before):
    of = results["one rank"]
    _check_same(of["challengers unweighted"], of["challengers without advantage"], before["one rank"])


def test_a_role_that_is_not_there_has_no_metrics(results):
    of = results["one rank"]
    assert "drift/reasoner" not in of["challengers only"]["metrics"][0]
    assert "drift/challenger" not in of["reasoners only"]["metrics"][0]


def test_drift_is_watched_even_when_nothing_is_learned(results):
    for variant in VARIANTS:
        assert results[variant]["no advantage"]["metrics"][0]["drift/mean"] > 0, variant
        assert "drift/mean" not in results[variant]["nothing but empty completions"]["metrics"][0], variant


def test_momentum_does_not_move_what_learns_nothing(results):
    """After a real step Adam has moments; an update without advantages must leave the weights alone all the same."""
    trained, silent, further = (results["momentum"][case]["weights"] for case in ("trained", "silent", "further"))
    assert all(np.array_equal(silent[name], weight) for name, weight in trained.items())
    assert not all(np.array_equal(further[name], weight) for name, weight in trained.items())

"""Batches that a run does meet, through a whole update on one and two ranks: nothing breaks, no trajectory is lost or counted
twice, and weights stay as they were, to the bit, where there is nothing to learn."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from safetensors.numpy import load_file
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
VARIANTS = {
    "one rank": (1, {}),
    "one rank, unshared": (1, {"shared_prefix": False}),
    "two ranks": (2, {}),
    "two ranks, unshared": (2, {"shared_prefix": False}),
    "two tensor ranks": (2, {"tensor_parallel_size": 2}),
    "two context ranks": (2, {"context_parallel_size": 2}),
}
# What is compared with another case needs no more than one layout of one and of two ranks.
LAWS = ["usual and empty", "empty in the middle", "duplicates", "challengers unweighted", "challengers without advantage"]
RUNS = [(variant, case) for variant in VARIANTS for case in CASES if case not in LAWS or variant in ("one rank", "two ranks")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "llama", tied=True)


@pytest.fixture(scope="module")
def results(model: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> case -> what every rank saw in its metrics, and the weights."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for size in (1, 2):
        keys = [(variant, case) for variant, case in RUNS if VARIANTS[variant][0] == size]
        jobs = [
            {"model": model, "overrides": {"policy": {**ADAM, **VARIANTS[variant][1], **CASES[case][1]}},
             "trajectories": CASES[case][0], "updates": 1, "gather": True}
            for variant, case in keys
        ]  # fmt: skip
        of_ranks = run_ranks(size, ON_RANKS, "in_layouts", jobs)
        for index, (variant, case) in enumerate(keys):
            metrics = [results[index]["updates"][0] for results in of_ranks]
            found.setdefault(variant, {})[case] = {"metrics": metrics, "weights": of_ranks[0][index]["weights"]}
    return found


@pytest.fixture(scope="module")
def before(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("variant, case", RUNS)
def test_every_number_is_one_and_the_same_on_all_ranks(results, variant, case):
    metrics, weights = results[variant][case].values()
    assert all(math.isfinite(value) for value in metrics[0].values())
    assert all(other == metrics[0] for other in metrics)
    assert all(np.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize("variant, case", [run for run in RUNS if run[1] in SILENT])
def test_nothing_to_learn_leaves_every_bit(results, before, variant, case):
    metrics, weights = results[variant][case].values()
    assert metrics[0]["policy/optimizer_steps"] == 0
    assert weights.keys() == before.keys()
    for name, weight in before.items():
        assert np.array_equal(weights[name], weight), name


@pytest.mark.parametrize("variant, case", [run for run in RUNS if run[1] not in SILENT])
def test_the_same_step_however_it_is_computed(results, before, variant, case):
    result, expected = results[variant][case], results["one rank"][case]
    learned = [t for t in CASES[case][0] if t.advantage or "bonus" in case]
    if case == "challengers unweighted":
        learned = [t for t in learned if t.role != "challenger"]
    tokens = sum(len(t.completion_ids) for t in learned)
    assert result["metrics"][0]["policy/completion_tokens"] == tokens
    assert result["metrics"][0]["policy/grad_norm"] > 1e-3
    _check_same(result, expected, before)


def _check_same(result: dict[str, Any], expected: dict[str, Any], before: dict[str, np.ndarray]) -> None:
    """Loss, gradient norm and every weight's step."""
    _check_loss(result, expected)
    steps = {name: np.linalg.norm(weight - before[name]) for name, weight in expected["weights"].items()}
    noise = 1e-5 * math.hypot(*steps.values())  # where a gradient is zero but for rounding, as of one token's attention
    for name, weight in expected["weights"].items():
        assert np.linalg.norm(result["weights"][name] - weight) <= 1e-3 * steps[name] + noise, name


def _check_loss(result: dict[str, Any], expected: dict[str, Any], factor: float = 1.0) -> None:
    for name in ("policy/loss", "policy/grad_norm"):
        assert result["metrics"][0][name] == pytest.approx(factor * expected["metrics"][0][name], rel=1e-4, abs=1e-8), name


def test_duplicates_weigh_as_the_batch_without_them(results, before):
    of = results["one rank"]
    _check_same(of["duplicates"], of["usual"], before)


def test_long_trajectories_are_not_cut(results, before):
    of = results["one rank"]
    _check_same(of["longer than a row"], of["usual"], before)


def test_empty_completions_count_in_the_denominator_only(results, before):
    of = results["one rank"]
    _check_loss(of["usual and empty"], of["usual"], factor=len(USUAL) / len(USUAL + EMPTY))
    _check_same(of["empty in the middle"], of["usual and empty"], before)


def test_a_role_of_weight_zero_teaches_nothing(results, before):
    of = results["one rank"]
    _check_same(of["challengers unweighted"], of["challengers without advantage"], before)


def test_a_role_that_is_not_there_has_no_metrics(results):
    of = results["one rank"]
    assert "drift/reasoner" not in of["challengers only"]["metrics"][0]
    assert "drift/challenger" not in of["reasoners only"]["metrics"][0]


def test_drift_is_watched_even_when_nothing_is_learned(results):
    for variant in VARIANTS:
        assert results[variant]["no advantage"]["metrics"][0]["drift/mean"] > 0, variant
        assert "drift/mean" not in results[variant]["nothing but empty completions"]["metrics"][0], variant


def test_momentum_does_not_move_what_learns_nothing(model, tmp_path):
    """After a real step Adam has moments; an update without advantages must leave the weights alone all the same."""
    job = {"model": model, "overrides": {"policy": ADAM}, "gather": True}
    [results] = run_ranks(1, ON_RANKS, "in_layouts", [
        {**job, "trajectories": USUAL, "updates": 1, "save": tmp_path / "saved"},
        {**job, "trajectories": NO_LEARNING, "updates": 1, "load": tmp_path / "saved"},
        {**job, "trajectories": USUAL, "updates": 1, "load": tmp_path / "saved"},
    ])  # fmt: skip
    trained, silent, further = (result["weights"] for result in results)
    assert all(np.array_equal(silent[name], weight) for name, weight in trained.items())
    assert not all(np.array_equal(further[name], weight) for name, weight in trained.items())

"""Training goes on from a checkpoint as if it had never stopped, in the same layout and in any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).parents[1] / "policy" / "on_ranks.py"
VIRTUAL = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}
EXPERTS = {"expert_parallel_size": 2}
# family, the layout that saves, others that load. Experts that are shared out have an optimiser of their own in Megatron.
CASES = {
    "pipeline": ("qwen3", {"pipeline_parallel_size": 2}, [{"tensor_parallel_size": 2}, VIRTUAL]),
    "virtual": ("qwen3", VIRTUAL, [{}]),
    "experts": ("qwen3_moe", EXPERTS, [{}, {"pipeline_parallel_size": 2}]),
    "experts_together": ("qwen3_moe", {}, [EXPERTS]),
}


def _job(model, policy, **rest):
    return {"model": model, "trajectories": some_trajectories(), "overrides": {"policy": policy}, **rest}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        family: make_model(tmp_path_factory.mktemp(family) / "hf", family, tied=family == "qwen3")
        for family in ("qwen3", "qwen3_moe")
    }


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """case -> what the uninterrupted run, the resumed one, and those in other layouts came to; one start of the ranks."""
    jobs = []
    for family, layout, others in CASES.values():
        saved, model = tmp_path_factory.mktemp("saved") / "run", models[family]
        jobs += [
            _job(model, layout, updates=4, gather=True),
            _job(model, layout, updates=2, save=saved),
            *(_job(model, there, load=saved, updates=2, gather=True) for there in (layout, *others)),
            _job(model, {**layout, "learning_rate": 1e-5}, load=saved, updates=2, gather=True),
        ]
    found = iter(run_ranks(2, ON_RANKS, "in_layouts", jobs)[0])
    return {
        case: {
            "through": next(found), "saved": next(found), "resumed": next(found),
            "others": [next(found) for _ in others], "slower": next(found),
        }
        for case, (_, _, others) in CASES.items()
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_takes_the_same_steps(results, case):
    through, resumed = results[case]["through"], results[case]["resumed"]
    for now, before in zip(resumed["updates"], through["updates"][2:]):
        assert now["policy/loss"] == before["policy/loss"]
    for name, weight in through["weights"].items():
        assert np.array_equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize("case", CASES)
def test_other_layouts_go_on_from_it(results, case):
    for other in results[case]["others"]:
        for name, weight in results[case]["through"]["weights"].items():
            np.testing.assert_allclose(other["weights"][name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_learning_rate_is_the_recipes(results, case):
    through, slower = results[case]["through"]["weights"], results[case]["slower"]["weights"]
    assert max(np.abs(slower[name] - weight).max() for name, weight in through.items()) > 5e-3, "the saved one was taken"

"""Training goes on from a checkpoint as if it had never stopped, in the same layout and in another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).parents[1] / "policy" / "on_ranks.py"


def _job(model, **rest):
    return {"model": model, "trajectories": some_trajectories(), "gather": False, **rest}


def _degrees(tensor, pipeline):
    return {"policy": {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen3") / "hf", "qwen3", tied=True)


def test_a_resumed_run_takes_the_same_steps(model, tmp_path):
    saved = tmp_path / "saved"
    through, _, resumed = run_ranks(2, ON_RANKS, "in_layouts", [
        _job(model, overrides=_degrees(1, 2), updates=4, gather=True),
        _job(model, overrides=_degrees(1, 2), updates=2, save=saved),
        _job(model, overrides=_degrees(1, 2), load=saved, updates=2, gather=True),
    ])[0]  # fmt: skip
    other = run_ranks(2, ON_RANKS, "in_layouts", [
        _job(model, overrides=_degrees(2, 1), load=saved, updates=2, gather=True),
        _job(model, overrides={"policy": {**_degrees(2, 1)["policy"], "learning_rate": 1e-5}}, load=saved, updates=2, gather=True),
    ])[0]  # fmt: skip
    other, slower = other
    for name, weight in through["weights"].items():
        assert np.array_equal(resumed["weights"][name], weight), name
        np.testing.assert_allclose(other["weights"][name], weight, atol=2e-4, err_msg=name)
    moved = max(np.abs(slower["weights"][name] - before).max() for name, before in through["weights"].items())
    assert moved > 5e-3, "a resumed run must take the recipe's learning rate, not the saved one"
    for now, before in zip(resumed["updates"], through["updates"][2:]):
        assert now["policy/loss"] == before["policy/loss"]

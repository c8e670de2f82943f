"""The weights that the policy is compared with: kept in host memory, exchanged bit for bit, the same after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from small_models import make_model, some_trajectories

from megatron_spice.policy import reference
from megatron_spice.policy.reference import Reference

ON_RANKS = Path(__file__).with_name("on_ranks.py")
TRAJECTORIES = some_trajectories()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    part=st.sampled_from([1, 8, 2**26]),
)  # fmt: skip
def test_weights_and_copy_change_places(sizes, dtype, part):
    buffers = [torch.randn(size, 3).to(dtype) for size in sizes]
    start = [buffer.clone() for buffer in buffers]
    copy = Reference(buffers)
    assert copy.num_bytes == sum(buffer.nbytes for buffer in buffers)
    views = [buffer[:1] for buffer in buffers]
    for buffer in buffers:
        buffer.add_(1.0)
    moved = [buffer.clone() for buffer in buffers]
    addresses = [buffer.data_ptr() for buffer in buffers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PART", part)
        for _ in range(2):
            with copy.in_place():
                assert all(map(torch.equal, buffers, start))
                assert all(torch.equal(view, whole[:1]) for view, whole in zip(views, start))
            assert all(map(torch.equal, buffers, moved))
    assert [buffer.data_ptr() for buffer in buffers] == addresses


def test_an_error_inside_leaves_the_weights():
    weights = torch.arange(5.0)
    copy = Reference([weights])
    weights += 1
    with pytest.raises(KeyError), copy.in_place():
        raise KeyError
    assert weights.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    model = make_model(tmp_path_factory.mktemp("model") / "hf", "llama", tied=True)
    saved = tmp_path_factory.mktemp("run") / "saved"

    def job(kl: float | None, updates: int, **rest) -> dict:
        policy = {"kl_coefficient": kl, "adam_eps": 1e-3, "pipeline_parallel_size": 2, "sleep": "all"}
        return {"model": model, "overrides": {"policy": policy}, "trajectories": rest.pop("trajectories", TRAJECTORIES),
                "updates": updates, "gather": True, **rest}  # fmt: skip

    silent = [t for t in TRAJECTORIES if not t.advantage]
    jobs = {
        "off": job(None, 3),
        "measured": job(0.0, 3),
        "penalised": job(5.0, 3),
        "interrupted": job(5.0, 2, save=saved),
        "resumed": job(5.0, 1, load=saved),
        "without advantage": job(5.0, 1, load=saved, trajectories=silent),
        "measured without advantage": job(0.0, 1, load=saved, trajectories=silent),
    }
    everyone = run_ranks(2, ON_RANKS, "in_layouts", list(jobs.values()))
    assert [result["updates"] for result in everyone[0]] == [result["updates"] for result in everyone[1]]
    return dict(zip(jobs, everyone[0]))


def _kl(result: dict) -> list[float]:
    return [update["policy/kl"] for update in result["updates"]]


def test_measuring_changes_nothing(results):
    off, measured = results["off"], results["measured"]
    assert all("policy/kl" not in update for update in off["updates"])
    assert all(np.array_equal(measured["weights"][name], weight) for name, weight in off["weights"].items())


def test_the_policy_moves_away_and_a_penalty_holds_it_back(results):
    measured, penalised = _kl(results["measured"]), _kl(results["penalised"])
    assert measured[0] == penalised[0] == 0 and measured[2] > measured[1] > 0
    assert 0 < penalised[2] < 0.8 * measured[2]


def test_a_resumed_run_is_compared_with_the_same_weights(results):
    assert _kl(results["interrupted"]) + _kl(results["resumed"]) == pytest.approx(_kl(results["penalised"]), rel=1e-5)
    for name, weight in results["penalised"]["weights"].items():
        np.testing.assert_allclose(results["resumed"]["weights"][name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_penalty_is_paid_without_advantage_too(results):
    assert results["without advantage"]["updates"][0]["policy/optimizer_steps"] == 1
    assert results["measured without advantage"]["updates"][0]["policy/optimizer_steps"] == 0

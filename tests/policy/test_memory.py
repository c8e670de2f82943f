"""Sleeping gives memory up, and waking brings back every bit of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_models import make_model, some_trajectories

from megatron_spice.policy.shelf import Shelf
from megatron_spice.telemetry.ranks import MEMORY

ON_RANKS = Path(__file__).with_name("memory_on_ranks.py")
PRECISIONS = ("fp32", "bf16")
GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3") / "hf", "qwen3", tied=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3_moe") / "hf", "qwen3_moe", tied=False)


@pytest.fixture(scope="module")
def results(model: Path) -> dict[tuple[str, str, int], list[dict]]:
    """(precision, level, times asleep after each update) -> what each of two data-parallel ranks saw."""
    keys = [(precision, level, sleeps) for precision in PRECISIONS for level, sleeps in
            (("all", 0), ("all", 1), ("all", 2), ("gradients", 1))]  # fmt: skip
    jobs = [
        ("sleep_between_updates", {"model": model, "trajectories": some_trajectories(), "precision": precision,
                                   "sleep": level, "sleeps": sleeps})
        for precision, level, sleeps in keys
    ]  # fmt: skip
    return dict(zip(keys, zip(*run_ranks(2, ON_RANKS, "in_turn", jobs))))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level, sleeps", [("all", 1), ("all", 2), ("gradients", 1)])
def test_a_policy_that_slept_goes_on_as_if_it_had_not(results, precision, level, sleeps):
    slept, through = results[precision, level, sleeps][0], results[precision, "all", 0][0]
    assert len(slept["same"]) == 3 * 3 * sleeps and all(slept["same"])
    for update, expected in zip(slept["updates"], through["updates"]):
        assert update["policy/loss"] == expected["policy/loss"] and update["policy/grad_norm"] == expected["policy/grad_norm"]
    for name, weight in through["weights"].items():
        assert np.array_equal(slept["weights"][name], weight), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", ["all", "gradients"])
def test_what_is_saved_of_a_policy_that_sleeps_is_what_it_was(results, precision, level):
    """With its weights awake and without, and nothing is woken for it."""
    for rank in results[precision, level, 1]:
        assert len(rank["saved"]) == 3 * 2 and all(rank["saved"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_of_it_is_gone_while_asleep(results, precision):
    for rank in results[precision, "all", 1]:
        for (awake, kept, asleep), metrics in zip(rank["held"], rank["metrics"]):
            assert all(awake.values())
            assert kept == {"weights": awake["weights"], "gradients": 0, "state": 0}
            assert asleep == {"weights": 0, "gradients": 0, "state": 0}
            assert metrics["memory/slept_gib"] * GIB == awake["gradients"] + awake["state"]
            assert metrics["memory/slept_weights_gib"] * GIB == awake["weights"]
            assert {name for name in metrics if name.startswith("memory/")} <= set(MEMORY), "these would be known of the first rank alone"
            assert {"memory/sleep_seconds", "memory/sleep_weights_seconds", "memory/wake_seconds"} <= metrics.keys()
            assert metrics["memory/free_for_policy_gib"] > 0


@pytest.mark.parametrize("layout", [
    {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
    {"expert_parallel_size": 2},
], ids=["several_chunks", "expert_buffers"])  # fmt: skip
def test_every_chunk_and_the_experts_sleep_too(mixture, layout):
    job = {"model": mixture, "trajectories": some_trajectories(), "precision": "bf16", "sleep": "all", **layout}
    through, slept = run_ranks(2, ON_RANKS, "in_turn", [("sleep_between_updates", {**job, "sleeps": n}) for n in (0, 1)])[0]
    assert all(slept["same"]) and all(slept["saved"]) and not any(sum(asleep.values()) for _, _, asleep in slept["held"])
    for name, weight in through["weights"].items():
        assert np.array_equal(slept["weights"][name], weight), name


def test_gradients_alone_need_no_copies(results):
    for awake, kept, asleep in results["bf16", "gradients", 1][0]["held"]:
        assert kept == asleep == {**awake, "gradients": 0}


def test_what_sleeps_is_not_used(model):
    job = {"model": model, "trajectories": some_trajectories()}
    [said] = run_ranks(1, ON_RANKS, "in_turn", [("use_while_asleep", job)])[0]
    assert len(said) == 3 and all("asleep" in words or "sleeping" in words for words in said)


def test_on_a_device_waking_waits_for_all_that_sleeps():
    """80 bytes of weights and 20 of optimiser state: 60 free bytes are not enough, 99 neither, 100 are."""
    [(free, left, error)] = run_ranks(1, ON_RANKS, "in_turn", [("wait_for_room", {"readings": [60, 99, 100, 7]})])[0]
    assert free == 100 and left == [7]
    assert "the policy wakes" in error


def test_host_copies_are_made_once_and_views_stay_valid():
    shelf = Shelf(torch.device("cpu"))
    whole = torch.randn(1000)
    view, whole_before = whole[10:20].view(2, 5), whole.clone()
    other = torch.arange(7, dtype=torch.bfloat16)
    assert shelf.put([whole, view, other]) == 4000 + 14
    assert whole.untyped_storage().nbytes() == view.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    copies = shelf._host.data_ptr()
    assert torch.equal(shelf.lying(view), whole_before[10:20].view(2, 5)), "what lies there can be read"
    assert torch.equal(shelf.lying(other), torch.arange(7, dtype=torch.bfloat16)) and shelf.lying(torch.zeros(1)) is None
    shelf.take_back()
    assert shelf.lying(view) is None
    assert torch.equal(whole, whole_before) and torch.equal(view, whole_before[10:20].view(2, 5))
    assert torch.equal(other, torch.arange(7, dtype=torch.bfloat16))
    shelf.put([other])
    assert shelf._host.data_ptr() == copies, "host memory is allocated once"
    shelf.take_back()
    shelf.take_back()
    assert torch.equal(other, torch.arange(7, dtype=torch.bfloat16))


@pytest.mark.parametrize("family, modules, again", [
    ("qwen3", ["core_attn"], ["core_attention"]),
    ("qwen3", ["core_attn", "mlp"], ["core_attention", "mlp"]),
    ("qwen3_moe", ["moe"], ["router", "expert"]),
    ("qwen3_moe", ["core_attn", "moe"], ["core_attention", "router", "expert"]),
])  # fmt: skip
def test_selective_recomputation_changes_nothing(recomputations, family, modules, again):
    """What is recomputed runs twice, all else once."""
    _check_recomputed(recomputations[family, tuple(modules)], recomputations[family, ()], again)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_full_recomputation_changes_nothing(recomputations, family):
    """Every layer runs twice, with all that is in it."""
    plain = recomputations[family, ()]
    _check_recomputed(recomputations[family, ("full",)], plain, list(plain["runs"]))


def _check_recomputed(result: dict, plain: dict, again: list[str]) -> None:
    assert result["update"]["policy/grad_norm"] == pytest.approx(plain["update"]["policy/grad_norm"], rel=1e-6)
    for name, weight in plain["weights"].items():
        np.testing.assert_allclose(result["weights"][name], weight, atol=1e-6, err_msg=name)
    assert set(again) <= plain["runs"].keys()
    for kind, times in plain["runs"].items():
        assert result["runs"][kind] == times * (2 if kind in again else 1), kind


def test_what_is_counted_is_there(recomputations):
    """4 layers, each with 8 experts in the mixture; as many forwards as rows."""
    dense, mixture = recomputations["qwen3", ()]["runs"], recomputations["qwen3_moe", ()]["runs"]
    rows = dense["layer"] // 4
    assert rows > 0 and dense == {"layer": 4 * rows, "core_attention": 4 * rows, "mlp": 4 * rows}
    assert mixture == {**dense, "router": 4 * rows, "expert": 8 * 4 * rows}


@pytest.fixture(scope="module")
def recomputations(model, mixture):
    """(family, modules) -> one update with these recomputed; () for none, ("full",) for whole layers."""
    settings = {(): {}, ("full",): {"recompute": "full"}}
    jobs = {
        (family, modules): ("recomputed", {
            "model": folder, "trajectories": some_trajectories(),
            **settings.get(modules, {"recompute": "selective", "recompute_modules": list(modules)}),
        })
        for family, folder, choices in [
            ("qwen3", model, [("core_attn",), ("core_attn", "mlp")]),
            ("qwen3_moe", mixture, [("moe",), ("core_attn", "moe")]),
        ]
        for modules in [*settings, *choices]
    }  # fmt: skip
    norms = {"recompute": "selective", "recompute_modules": ["layernorm"]}
    jobs["qwen3", "refused"] = ("refusal", {"model": model, **norms})
    return dict(zip(jobs, run_ranks(1, ON_RANKS, "in_turn", list(jobs.values()))[0], strict=True))


def test_norms_of_a_dense_model_are_not_recomputed(recomputations):
    assert "policy.recompute_modules=layernorm is for mixtures" in recomputations["qwen3", "refused"]

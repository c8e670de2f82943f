"""Any layout computes the same: Hugging Face's log-probabilities, one loss, one gradient, one step, one set of weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_models import VOCAB, make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("on_ranks.py")
FAMILIES = [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2), (1, 4), (2, 1), (1, 2)]}
CASES = [(size, *layout) for size, layouts in LAYOUTS.items() for layout in layouts]
IDS = [7, 3, 150, 202, 9, 9, 41, 0, 77, 121, 5]
TRAJECTORIES = some_trajectories()
# What must not change the loss either: (name, policy settings)
VARIANTS = {"small_rows": {"tokens_per_microbatch": 24}, "unshared": {"shared_prefix": False}, "recompute": {"recompute": "full"}}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    return {family: make_model(tmp_path_factory.mktemp("model") / "hf", *family) for family in FAMILIES}


@pytest.fixture(scope="session")
def results(models: dict[tuple[str, bool], Path]) -> dict[tuple, dict]:
    """(ranks, TP, PP, family, variant) -> what rank 0 saw; one start of the ranks for all layouts of a size."""
    found = {}
    for size, layouts in LAYOUTS.items():
        keys, jobs = [], []
        for tensor, pipeline in layouts:
            degrees = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
            for family in FAMILIES:
                keys.append((size, tensor, pipeline, family, None))
                jobs.append({"model": models[family], "overrides": {"policy": degrees}, "score": IDS, "gather": True,
                             "trajectories": TRAJECTORIES, "updates": 1})  # fmt: skip
            for name, settings in VARIANTS.items():
                keys.append((size, tensor, pipeline, FAMILIES[0], name))
                jobs.append({"model": models[FAMILIES[0]], "overrides": {"policy": {**degrees, **settings}},
                             "trajectories": TRAJECTORIES, "updates": 1, "gather": True})  # fmt: skip
        found.update(zip(keys, run_ranks(size, ON_RANKS, "in_layouts", jobs)[0]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size, tensor, pipeline", CASES)
def test_log_probabilities_are_transformers(results, models, size, tensor, pipeline, family):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    ours = torch.tensor(results[size, tensor, pipeline, family, None]["score"])
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size, tensor, pipeline", CASES)
def test_a_step_is_the_same_in_every_layout(results, size, tensor, pipeline, family):
    _check_same(results[size, tensor, pipeline, family, None], results[1, 1, 1, family, None])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size, tensor, pipeline", CASES)
def test_packing_sharing_and_recompute_change_nothing(results, size, tensor, pipeline, variant):
    _check_same(results[size, tensor, pipeline, FAMILIES[0], variant], results[1, 1, 1, FAMILIES[0], None])


def _check_same(result: dict, reference: dict) -> None:
    [update], [expected] = result["updates"], reference["updates"]
    assert expected["policy/grad_norm"] > 0.01
    for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "drift/mean", "policy/completion_tokens"):
        assert update[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-8), name
    assert result["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        # Adam's first step is lr * sign(gradient): where a gradient is rounding noise around zero its sign may differ.
        far = np.abs(result["weights"][name] - weight) > 1e-4
        assert far.mean() < 2e-3, name


def test_sharing_saves_tokens(results):
    shared, unshared = (results[1, 1, 1, FAMILIES[0], name]["updates"][0] for name in (None, "unshared"))
    assert shared["policy/tokens"] < unshared["policy/tokens"]
    assert shared["policy/prefix_saving"] == pytest.approx(unshared["policy/tokens"] / shared["policy/tokens"])


def test_the_loss_is_drgrpo(results, models):
    """Against the formula written out with transformers and autograd: sum over tokens / (trajectories x L_max)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[FAMILIES[0]], dtype=torch.float32)
    loss = torch.zeros(())
    for trajectory in TRAJECTORIES:
        ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
        start = len(trajectory.prompt_ids)
        logprobs = model(ids).logits[0].log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
        loss = loss - ((logprobs - logprobs.detach()).exp() * trajectory.advantage).sum() / (len(TRAJECTORIES) * 16)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    update = results[1, 1, 1, FAMILIES[0], None]["updates"][0]
    assert update["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert update["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_llama3_rope_scaling_is_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "hf", "llama", tied=False, rope_scaling=True)
    ids = [(7 * index) % VOCAB for index in range(200)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    [[result]] = run_ranks(1, ON_RANKS, "in_layouts", [{"model": model, "score": ids}])
    assert (torch.tensor(result["score"]) - expected).abs().max() < 1e-4


def test_a_gradient_that_is_not_finite_stops_the_run(models):
    broken = [dataclasses.replace(t, advantage=float("inf")) for t in TRAJECTORIES[:1]]
    with pytest.raises(AssertionError, match="(?i)nan|not finite|the gradient norm is"):
        run_ranks(1, ON_RANKS, "in_layouts", [{"model": models[FAMILIES[0]], "trajectories": broken, "updates": 1}])


def test_an_update_without_advantages_changes_nothing(models):
    silent = [t for t in TRAJECTORIES if not t.advantage]
    [result] = run_ranks(1, ON_RANKS, "in_layouts", [
        {"model": models[FAMILIES[0]], "trajectories": silent, "updates": 1, "gather": True},
        {"model": models[FAMILIES[0]], "gather": True},
        {"model": models[FAMILIES[0]], "trajectories": [], "updates": 1},
    ])  # fmt: skip
    assert result[0]["updates"][0]["policy/optimizer_steps"] == 0
    assert result[0]["updates"][0]["drift/mean"] > 0, "drift is watched even when nothing is learned"
    assert all((result[0]["weights"][name] == weight).all() for name, weight in result[1]["weights"].items())


def test_several_steps_clip_and_differ_from_one(models):
    several = {"train": {"optimizer_steps": 2}, "policy": {"importance_cap": 2.0, "tokens_per_microbatch": 24}}
    [[one, two]] = run_ranks(1, ON_RANKS, "in_layouts", [
        {"model": models[FAMILIES[0]], "trajectories": TRAJECTORIES, "updates": 1},
        {"model": models[FAMILIES[0]], "overrides": several, "trajectories": TRAJECTORIES, "updates": 1},
    ])  # fmt: skip
    assert one["updates"][0]["policy/clipped"] == 0
    assert two["updates"][0]["policy/optimizer_steps"] == 2
    assert two["updates"][0]["policy/clipped"] > 0  # the second step starts a whole Adam step of 1e-2 away


def test_vocabulary_is_odd():
    assert VOCAB % 2, "an even vocabulary would not test its padding"

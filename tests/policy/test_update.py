"""What an update is, on one rank: DrGRPO, skipped where there is nothing to learn, stopped where it breaks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_models import VOCAB, make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("on_ranks.py")
TRAJECTORIES = some_trajectories()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "llama", tied=True)


def _run(*jobs: dict) -> list[dict]:
    return run_ranks(1, ON_RANKS, "in_layouts", list(jobs))[0]


def test_the_loss_is_drgrpo(model):
    """Against the formula written out with transformers and autograd: sum over tokens / (trajectories x L_max)."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss = torch.zeros(())
    for trajectory in TRAJECTORIES:
        ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
        start = len(trajectory.prompt_ids)
        logprobs = theirs(ids).logits[0].log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
        loss = loss - ((logprobs - logprobs.detach()).exp() * trajectory.advantage).sum() / (len(TRAJECTORIES) * 16)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in theirs.parameters()]).norm()
    [result] = _run({"model": model, "trajectories": TRAJECTORIES, "updates": 1})
    assert result["updates"][0]["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["updates"][0]["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_llama3_rope_scaling_is_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "hf", "llama", tied=False, rope_scaling=True)
    ids = [(7 * index) % VOCAB for index in range(200)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    [result] = _run({"model": model, "score": ids})
    assert (torch.tensor(result["score"]) - expected).abs().max() < 1e-4


def test_a_gradient_that_is_not_finite_stops_the_run(model):
    broken = [dataclasses.replace(t, advantage=float("inf")) for t in TRAJECTORIES[:1]]
    with pytest.raises(AssertionError, match="(?i)nan|not finite|the gradient norm is"):
        _run({"model": model, "trajectories": broken, "updates": 1})


def test_an_update_without_advantages_changes_nothing(model):
    silent = [t for t in TRAJECTORIES if not t.advantage]
    updated, untouched, _ = _run(
        {"model": model, "trajectories": silent, "updates": 1, "gather": True},
        {"model": model, "gather": True},
        {"model": model, "trajectories": [], "updates": 1},
    )
    assert updated["updates"][0]["policy/optimizer_steps"] == 0
    assert updated["updates"][0]["drift/mean"] > 0, "drift is watched even when nothing is learned"
    assert all((updated["weights"][name] == weight).all() for name, weight in untouched["weights"].items())


def test_several_steps_clip_and_differ_from_one(model):
    several = {"train": {"optimizer_steps": 2}, "policy": {"importance_cap": 2.0, "tokens_per_microbatch": 24}}
    one, two = _run(
        {"model": model, "trajectories": TRAJECTORIES, "updates": 1},
        {"model": model, "overrides": several, "trajectories": TRAJECTORIES, "updates": 1},
    )
    assert one["updates"][0]["policy/clipped"] == 0
    assert two["updates"][0]["policy/optimizer_steps"] == 2
    assert two["updates"][0]["policy/clipped"] > 0  # the second step starts a whole Adam step of 1e-2 away


def test_an_entropy_bonus_is_paid_to_trajectories_without_advantage(model):
    silent = [t for t in TRAJECTORIES if not t.advantage]
    [paid] = _run({"model": model, "trajectories": silent, "updates": 2, "overrides": {"policy": {"entropy_bonus": 0.5}}})
    first, second = paid["updates"]
    assert first["policy/optimizer_steps"] == 1 and second["policy/entropy"] > first["policy/entropy"]


def test_vocabulary_is_odd():
    assert VOCAB % 2, "an even vocabulary would not test its padding"

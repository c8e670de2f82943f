"""The loss of one row, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.config.schema import PolicyConfig
from megatron_spice.game.records import Trajectory
from megatron_spice.policy.loss import LossSettings, row_loss
from megatron_spice.policy.metrics import BINS, SUMS, _add
from megatron_spice.policy.packing import Block
from megatron_spice.policy.rows import row_tensors


def _row(*pieces: tuple[float, tuple[float, ...]], roles: tuple[str, ...] = ()):
    roles = roles or ("reasoner",) * len(pieces)
    members = tuple(
        Trajectory(role, (1,), (2,) * len(l), l, a, 0.0, weight=0.25) for role, (a, l) in zip(roles, pieces, strict=True)
    )
    return row_tensors((Block((1,), members),), "cpu")


def test_one_step_is_reinforce():
    row = _row((2.0, (-1.0, -1.0)), (-1.0, (-1.0,)))
    logprobs = torch.tensor([-0.3, -2.0, -5.0], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(3), row, LossSettings(None, None))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * (2 + 2 - 1))
    assert logprobs.grad.tolist() == [-0.5, -0.5, 0.25]
    assert tensors["drift"].tolist() == pytest.approx([0.7, 1.0, 4.0])


def test_drift_is_of_fresh_tokens_and_importance_of_all():
    """A token of older weights drifts by what was learned since; the cap's weight must still know what it was sampled from."""
    members = (Trajectory("reasoner", (1,), (2, 2), (-3.0, -1.0), 1.0, 0.0, weight=0.25, num_stale=1),)
    row = row_tensors((Block((1,), members),), "cpu")
    logprobs = torch.tensor([-1.0, -1.5], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(2), row, LossSettings(None, 2.0))
    loss.backward()
    assert tensors["capped"].tolist() == [1.0, 0.0]
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * 2.0, -0.25 * math.exp(-0.5)])
    sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}
    _add({**tensors, "loss": loss.detach()}, sums, torch.zeros(2, BINS, dtype=torch.float64))
    assert (sums["drift"], sums["fresh"], sums["count"]) == (0.5, 1, 2)


def test_clipping_stops_gradients_only_where_the_step_went_too_far():
    row = _row((1.0, (0.0,)), (-1.0, (0.0,)), (1.0, (0.0,)))
    row.old_logprobs_c = torch.tensor([-1.0, -1.0, -1.0])
    logprobs = torch.tensor([-0.5, -0.5, -1.5], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(3), row, LossSettings(0.2, None))
    loss.backward()
    assert tensors["clipped"].tolist() == [1.0, 0.0, 0.0]
    assert logprobs.grad[0] == 0 and logprobs.grad[1] > 0 and logprobs.grad[2] < 0


def test_truncated_importance_weights():
    row = _row((1.0, (-1.0,)), (1.0, (-1.0,)))
    logprobs = torch.tensor([-1.5, 4.0], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(2), row, LossSettings(None, 2.0))
    loss.backward()
    assert tensors["capped"].tolist() == [0.0, 1.0]
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * math.exp(-0.5), -0.25 * 2.0])


def test_dual_clip_bounds_what_a_negative_advantage_may_push():
    """Ratios e (unbounded: 2 e), 2 (not yet bounded) and, with a positive advantage, e: that one is the usual clip's."""
    row = _row((-2.0, (0.0,)), (-2.0, (0.0,)), (1.0, (0.0,)))
    row.old_logprobs_c = torch.tensor([-2.0, -2.0, -2.0])
    logprobs = torch.tensor([-1.0, -2.0 + math.log(2.0), -1.0], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(3), row, LossSettings(0.2, None, dual_clip=2.5))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * (2.5 * 2 + 2 * 2 - 1.2))
    assert tensors["dual_clipped"].tolist() == [1.0, 0.0, 0.0] and tensors["clipped"].tolist() == [0.0, 0.0, 1.0]
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.25 * 2 * 2, 0.0])


def test_the_penalty_for_moving_away():
    """Ratios of the reference to the policy: 2 (the policy moved down), 1 (nothing to pay, no slope), 1/2. On the policy's own
    tokens the slope is log pi / pi_reference: that of the divergence itself."""
    row = _row((0.0, (-1.0, -1.0, -1.0)))
    row.reference_logprobs_c = torch.tensor([-1.0, -1.0, -1.0])
    logprobs = torch.tensor([-1.0 - math.log(2.0), -1.0, -1.0 + math.log(2.0)], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(3), row, LossSettings(None, None, kl_coefficient=2.0))
    loss.backward()
    expected = [1 - math.log(2.0), 0.0, math.log(2.0) - 0.5]
    assert tensors["kl"].tolist() == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.25 * 2.0 * sum(expected))
    assert logprobs.grad.tolist() == pytest.approx([0.25 * 2.0 * -math.log(2.0), 0.0, 0.25 * 2.0 * math.log(2.0)])


@given(st.floats(-1e-3, 1e-3))
def test_the_divergence_is_never_negative(away):
    row = _row((0.0, (-1.0,)))
    row.reference_logprobs_c = torch.tensor([-1.0 + away])
    assert row_loss(torch.tensor([-1.0]), torch.zeros(1), row, LossSettings(None, None))[1]["kl"].item() >= 0


def test_without_a_reference_nothing_is_measured():
    row = _row((1.0, (-1.0,)))
    assert "kl" not in row_loss(torch.zeros(1), torch.zeros(1), row, LossSettings(None, None, kl_coefficient=2.0))[1]


def test_the_entropy_bonus_counts_tokens_as_the_loss_does():
    row = _row((0.0, (-1.0, -1.0)), (2.0, (-1.0,)))
    entropies = torch.tensor([0.5, 1.5, 2.0], requires_grad=True)
    loss, tensors = row_loss(torch.full((3,), -1.0), entropies, row, LossSettings(None, None, entropy_bonus=0.1))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * (2.0 + 0.1 * (0.5 + 1.5 + 2.0)))
    assert entropies.grad.tolist() == pytest.approx([-0.025] * 3)
    assert not tensors["entropy"].requires_grad


def test_role_weights():
    row = _row((1.0, (-1.0,)), (1.0, (-1.0, -1.0)), roles=("challenger", "reasoner"))
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    settings = LossSettings(None, None, entropy_bonus=2.0, challenger_weight=3.0, reasoner_weight=0.5)
    loss, _ = row_loss(logprobs, torch.ones(3), row, settings)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * (3.0 * (1 + 2) + 0.5 * 2 * (1 + 2)))
    assert logprobs.grad.tolist() == pytest.approx([-0.75, -0.125, -0.125])


numbers = st.floats(-3, 3, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=8), st.floats(1.21, 5))
def test_dual_clip_touches_nothing_else(tokens, bound):
    """Every token's surrogate is the larger of the plain one and bound * advantage, its gradient the plain one or 0."""
    row = _row(*((advantage, (engine,)) for advantage, engine, _, _ in tokens))
    row.old_logprobs_c = torch.tensor([old for _, _, old, _ in tokens])

    def of_each(settings):
        logprobs = torch.tensor([now for *_, now in tokens], requires_grad=True)
        losses = [row_loss(logprobs[[i]], torch.zeros(1), _only(row, i), settings)[0] for i in range(len(tokens))]
        surrogates = torch.stack(losses) / -0.25
        surrogates.sum().backward()
        return surrogates.detach(), logprobs.grad

    plain, plain_grad = of_each(LossSettings(0.2, None))
    dual, dual_grad = of_each(LossSettings(0.2, None, dual_clip=bound))
    floor = torch.where(row.advantages_c < 0, bound * row.advantages_c, -torch.inf)
    torch.testing.assert_close(dual, torch.maximum(plain, floor))
    torch.testing.assert_close(dual_grad, torch.where(plain < floor, 0.0, plain_grad))


def _only(row, index: int):
    """One token of a row of one-token completions."""
    one = _row((row.advantages_c[index].item(), (row.rollout_logprobs_c[index].item(),)))
    one.old_logprobs_c = row.old_logprobs_c[[index]]
    return one


def test_settings_of_a_recipe():
    plain = LossSettings.of(PolicyConfig(model="m"), several_steps=True)
    assert plain == LossSettings(0.2, None)
    recipe = PolicyConfig(
        model="m", clip_ratio=0.1, dual_clip=3.0, importance_cap=2.0, entropy_bonus=0.01, kl_coefficient=0.02,
        role_weights={"challenger": 0.5},
    )  # fmt: skip
    several = LossSettings.of(recipe, several_steps=True)
    assert several == LossSettings(0.1, 2.0, 3.0, 0.01, 0.02, 0.5, 1.0)
    assert LossSettings.of(recipe, several_steps=False) == LossSettings(None, 2.0, None, 0.01, 0.02, 0.5, 1.0)

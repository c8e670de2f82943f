"""The loss of one row, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_spice.game.records import Trajectory
from megatron_spice.policy.loss import LossSettings, row_loss
from megatron_spice.policy.packing import Block
from megatron_spice.policy.rows import row_tensors


def _row(*pieces: tuple[float, tuple[float, ...]]):
    members = tuple(Trajectory("reasoner", (1,), (2,) * len(l), l, a, 0.0, weight=0.25) for a, l in pieces)
    return row_tensors((Block((1,), members),), "cpu")


def test_one_step_is_reinforce():
    row = _row((2.0, (-1.0, -1.0)), (-1.0, (-1.0,)))
    logprobs = torch.tensor([-0.3, -2.0, -5.0], requires_grad=True)
    loss, tensors = row_loss(logprobs, torch.zeros(3), row, LossSettings(None, None))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * (2 + 2 - 1))
    assert logprobs.grad.tolist() == [-0.5, -0.5, 0.25]
    assert tensors["drift"].tolist() == pytest.approx([0.7, 1.0, 4.0])


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
    loss, _ = row_loss(logprobs, torch.zeros(2), row, LossSettings(None, 2.0))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * math.exp(-0.5), -0.25 * 2.0])

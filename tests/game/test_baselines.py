"""Running baselines of the roles."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.baselines import RoleBaselines
from megatron_spice.game.records import Trajectory


def _trajectories(*rewards: tuple[str, float]) -> list[Trajectory]:
    return [Trajectory(role, (1,), (2,), (-1.0,), advantage=9.0, reward=reward) for role, reward in rewards]


def _advantages(baselines: RoleBaselines, *rewards: tuple[str, float]) -> list[float]:
    return [trajectory.advantage for trajectory in baselines.apply(_trajectories(*rewards))]


def test_each_role_against_its_own_past():
    baselines = RoleBaselines(0.75)
    assert _advantages(baselines, ("challenger", 0.5), ("reasoner", 1.0), ("reasoner", 0.0)) == [0.0, 0.5, -0.5]
    assert _advantages(baselines, ("reasoner", 1.0), ("reasoner", 1.0)) == [0.5, 0.5]
    assert baselines.state_dict() == {"challenger": 0.5, "reasoner": 0.625}
    assert _advantages(baselines, ("reasoner", 0.0), ("challenger", -0.5)) == [-0.625, -1.0]


def test_only_the_advantage_changes():
    [before] = _trajectories(("challenger", 0.25))
    [after] = RoleBaselines(0.5).apply([before])
    assert (after.role, after.prompt_ids, after.completion_ids, after.logprobs, after.reward, after.weight) == (
        before.role, before.prompt_ids, before.completion_ids, before.logprobs, before.reward, before.weight
    )  # fmt: skip


def test_nothing_to_apply_to():
    baselines = RoleBaselines(0.5)
    assert baselines.apply([]) == [] and baselines.state_dict() == {}


def test_a_role_that_there_is_not():
    with pytest.raises(ValueError, match="judge"):
        RoleBaselines(0.5).load_state_dict({"judge": 0.0})


iterations = st.lists(
    st.lists(st.tuples(st.sampled_from(["challenger", "reasoner"]), st.floats(-1, 1)), max_size=5), min_size=1, max_size=5
)


@given(iterations, st.floats(0, 0.99), st.integers(0, 5))
def test_a_loaded_state_goes_on_where_it_was_saved(rewards, decay, cut):
    whole, resumed = RoleBaselines(decay), RoleBaselines(decay)
    for number, iteration in enumerate(rewards):
        if number == cut:
            state, resumed = resumed.state_dict(), RoleBaselines(decay)
            resumed.load_state_dict(state)
        assert _advantages(whole, *iteration) == _advantages(resumed, *iteration)


@given(iterations, st.floats(0, 0.99))
def test_the_baseline_is_a_mean_of_iteration_means(rewards, decay):
    """By the definition unrolled, and within the range of what it averages."""
    baselines, expected = RoleBaselines(decay), None
    for iteration in rewards:
        baselines.apply(_trajectories(*iteration))
        if mine := [reward for role, reward in iteration if role == "reasoner"]:
            expected = fmean(mine) if expected is None else decay * expected + (1 - decay) * fmean(mine)
    assert baselines.state_dict().get("reasoner") == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_equal_rewards_have_no_advantage_left_over_from_rounding():
    baselines = RoleBaselines(0.9)
    for _ in range(20):
        assert _advantages(baselines, *[("reasoner", 0.1)] * 3) == [0.0] * 3

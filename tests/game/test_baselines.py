"""Running baselines of the roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_game import GHANA

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.baselines import RoleBaselines
from megatron_spice.game.episodes import trajectories
from megatron_spice.game.records import Answer, Attempt, Completion, Episode, Verdict


def _episode(rewards: Sequence[tuple[str, float]], slot: int = 0) -> Episode:
    """An episode whose group was paid the Challenger's rewards, and whose task's answers the Reasoner's. What is not trained on
    has rewards too: an attempt outside the group, and answers to a task that was not chosen."""
    completion = Completion((1,), (2,), (-1.0,), "stop", "text", "0")
    verdict = Verdict(False, None, "no_answer")
    answers = tuple(Answer(completion, verdict, reward, 9.0) for role, reward in rewards if role == "reasoner")
    unchosen = (Answer(completion, verdict, 0.7, None),)
    group = [Attempt(completion, None, None, in_group=True, reward=r, advantage=9.0) for role, r in rewards if role == "challenger"]
    chosen = [Attempt(completion, None, None, answers=answers, is_reasoner_task=True)] if answers else []
    return Episode(1, slot, GHANA, "chat", "String", (*group, *chosen, Attempt(completion, None, None, answers=unchosen, reward=0.3)))


def _advantages(baselines: RoleBaselines, *rewards: tuple[str, float]) -> list[float]:
    """Of what is trained on, the Challenger's first; each reward in an episode of its own."""
    episodes = baselines.apply([_episode([paid], slot) for slot, paid in enumerate(rewards)])
    found = [t for t in trajectories(episodes, GameConfig()) if t.completion_ids]
    return [t.advantage for role in ("challenger", "reasoner") for t in found if t.role == role]


def test_each_role_against_its_own_past():
    baselines = RoleBaselines(0.75)
    assert _advantages(baselines, ("challenger", 0.5), ("reasoner", 1.0), ("reasoner", 0.0)) == [0.0, 0.5, -0.5]
    assert baselines.metrics() == {"challenger/baseline": 0.5, "reasoner/baseline": 0.5}
    assert _advantages(baselines, ("reasoner", 1.0), ("reasoner", 1.0)) == [0.5, 0.5]
    assert baselines.state_dict() == {"challenger": 0.5, "reasoner": 0.625}
    assert _advantages(baselines, ("reasoner", 0.0), ("challenger", -0.5)) == [-1.0, -0.625]


def test_only_the_advantages_of_what_is_trained_on_change():
    before = _episode([("challenger", 0.25), ("challenger", 0.75), ("reasoner", 1.0), ("reasoner", 0.0)])
    baselines = RoleBaselines(0.5)
    [after] = baselines.apply([before])
    first, second, chosen, outside = after.attempts
    assert (first.advantage, second.advantage) == (-0.25, 0.25)
    assert [answer.advantage for answer in chosen.answers] == [0.5, -0.5]
    assert outside == before.attempts[-1]
    back = [replace(attempt, advantage=9.0) for attempt in (first, second)]
    answers = tuple(replace(answer, advantage=9.0) for answer in chosen.answers)
    assert replace(after, attempts=(*back, replace(chosen, answers=answers), outside)) == before
    assert baselines.metrics() == {"challenger/baseline": 0.5, "reasoner/baseline": 0.5}


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
        _advantages(baselines, *iteration)
        if mine := [reward for role, reward in iteration if role == "reasoner"]:
            expected = fmean(mine) if expected is None else decay * expected + (1 - decay) * fmean(mine)
    assert baselines.state_dict().get("reasoner") == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_equal_rewards_have_no_advantage_left_over_from_rounding():
    baselines = RoleBaselines(0.9)
    for _ in range(20):
        assert _advantages(baselines, *[("reasoner", 0.1)] * 3) == [0.0] * 3

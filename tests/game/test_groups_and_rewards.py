from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.groups import advantages, subsample, valid_count
from megatron_spice.game.rewards import challenger_reward, majority_share, reasoner_reward


@given(st.lists(st.booleans(), min_size=0, max_size=1200), st.integers(1, 16), st.integers(0, 9))
def test_subsample_keeps_size_ratio_and_both_kinds(validity, size, seed):
    group = subsample(validity, size, random.Random(seed))
    valid, total = sum(validity), len(validity)
    chosen = sum(validity[index] for index in group)
    assert group == sorted(set(group))
    assert len(group) == min(size, total)
    assert set(group) <= set(range(total))
    if valid:
        assert chosen >= 1
    if valid < total and size > 1:
        assert chosen < len(group)
    if total > size and 1 < chosen < size - 1:
        assert abs(chosen - size * valid / total) <= 0.5


@pytest.mark.parametrize(
    ("valid", "invalid", "size", "kept"),
    [
        (0, 16, 8, 0),
        (1, 1023, 8, 1),
        (1023, 1, 8, 7),
        (16, 0, 8, 8),
        (8, 8, 8, 4),
        (3, 13, 8, 2),  # 1.5: half up
        (5, 11, 8, 3),  # 2.5: half up, where Python's round would say 2
        (1, 15, 1, 1),  # one place, two kinds: without the valid one there is no task
    ],
)
def test_valid_count(valid, invalid, size, kept):
    assert valid_count(valid, invalid, size) == kept
    group = subsample([True] * valid + [False] * invalid, size, random.Random(1))
    assert sum(index < valid for index in group) == kept


def test_subsample_is_uniform_within_a_kind_and_reproducible():
    counts = [0] * 12
    for seed in range(3000):
        group = subsample([True] * 12 + [False] * 12, 8, random.Random(seed))
        assert group == subsample([True] * 12 + [False] * 12, 8, random.Random(seed))
        for index in group:
            if index < 12:
                counts[index] += 1
    assert all(abs(count - 1000) < 130 for count in counts)  # five standard deviations


@pytest.mark.parametrize(
    ("kind", "by_correct"),
    [
        ("variance", [0.0439, 0.3720, 0.8226, 0.9879, 1.0, 0.9879, 0.8226, 0.3720, 0.0439]),
        ("threshold", [0, 1, 1, 1, 1, 1, 1, 1, 0]),
        ("r_zero", [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("absolute_zero", [0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
    ],
)
def test_golden_rewards(kind, by_correct):
    assert [round(challenger_reward(kind, correct / 8), 4) for correct in range(9)] == by_correct


@given(st.integers(1, 64).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k))))
def test_variance_reward_is_symmetric_peaks_at_half_and_beats_invalid(rate):
    correct, answers = rate
    reward = challenger_reward("variance", correct / answers)
    assert math.isclose(reward, challenger_reward("variance", (answers - correct) / answers))
    assert challenger_reward("variance", 0.0) - 1e-12 <= reward <= challenger_reward("variance", 0.5) == 1.0
    assert reward > 0.0 > -0.1


KINDS = ("variance", "threshold", "r_zero", "absolute_zero")
RATES = st.integers(1, 64).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k)))


@given(st.sampled_from(KINDS), RATES)
def test_every_reward_lies_between_nothing_and_one_and_above_the_penalty(kind, rate):
    reward = challenger_reward(kind, rate[0] / rate[1])
    assert 0.0 <= reward <= 1.0
    assert reward > -0.1, "a valid task is never worth less than an invalid attempt"


@given(st.sampled_from(("variance", "threshold", "r_zero")), RATES)
def test_all_but_absolute_zero_do_not_tell_too_hard_from_too_easy(kind, rate):
    correct, answers = rate
    assert challenger_reward(kind, correct / answers) == pytest.approx(challenger_reward(kind, (answers - correct) / answers))


@given(st.integers(1, 32))
def test_where_each_reward_is_largest(half):
    answers = 2 * half
    paid = {kind: [challenger_reward(kind, correct / answers) for correct in range(answers + 1)] for kind in KINDS}
    for kind in ("variance", "r_zero"):
        assert paid[kind].index(max(paid[kind])) == half and paid[kind][half] == 1.0
        assert paid[kind][: half + 1] == sorted(paid[kind][: half + 1])
    assert paid["threshold"] == [0.0] + [1.0] * (answers - 1) + [0.0]
    assert paid["absolute_zero"][1] == max(paid["absolute_zero"]) == pytest.approx(1 - 1 / answers)
    assert paid["absolute_zero"][1:] == sorted(paid["absolute_zero"][1:], reverse=True)
    for kind in ("threshold", "r_zero", "absolute_zero"):
        assert paid[kind][0] == paid[kind][-1] == 0.0, "what nobody or everybody answers is worth nothing"


@given(st.lists(st.sampled_from(["Accra", " accra. ", "Lagos", "7", None]), min_size=1, max_size=12))
def test_the_majority_is_of_answers_that_are_there_and_equal_in_form(answers):
    share = majority_share(answers)
    forms = ["accra" if answer and "ccra" in answer else answer for answer in answers]
    assert share == max(forms.count(form) for form in {*forms, "none"} - {None}) / len(answers)
    assert 0.0 <= challenger_reward("r_zero", share) <= 1.0
    assert majority_share([None] * len(answers)) == 0.0


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="spicy"):
        challenger_reward("spicy", 0.5)
    with pytest.raises(ValueError, match="1.5"):
        challenger_reward("variance", 1.5)


def test_reasoner_reward():
    assert (reasoner_reward(True), reasoner_reward(False)) == (1.0, 0.0)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=16))
def test_advantages_sum_to_zero_and_keep_differences(rewards):
    relative = advantages(rewards)
    assert abs(math.fsum(relative)) < 1e-12
    for reward, advantage in zip(rewards, relative):
        assert math.isclose(advantage - relative[0], reward - rewards[0], abs_tol=1e-12)


@given(st.floats(-1, 1), st.integers(1, 16))
def test_equal_rewards_give_exact_zeros(reward, count):
    assert advantages([reward] * count) == [0.0] * count

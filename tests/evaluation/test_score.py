from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.evaluation.score import mean_of, over_items, score, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],  # published examples
)
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_its_equation(pair):
    successes, trials = pair
    share = successes / trials
    for end in wilson(successes, trials):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials), rel=1e-6, abs=1e-9)


def test_several_samples_are_no_independent_trials():
    """32 answers to each of 30 questions that are all right or all wrong say no more than one answer to each."""
    alone = score([[place % 3 == 0] for place in range(30)])
    together = score([[place % 3 == 0] * 32 for place in range(30)])
    assert together.mean == alone.mean == pytest.approx(1 / 3)
    assert together.samples == 32 and together.items == 30
    assert together.high - together.low == pytest.approx(alone.high - alone.low, abs=0.04)


def test_it_has_width_where_all_questions_are_alike():
    none, every = score([[False] * 32] * 30), score([[True] * 32] * 30)
    assert (none.mean, none.low) == (0.0, 0.0) and 0.09 < none.high < 0.16
    assert (every.mean, every.high) == (1.0, 1.0) and every.low == pytest.approx(1 - none.high)
    half = score([[True] * 16 + [False] * 16] * 30)
    assert half.low == pytest.approx(1 - half.high) and 0.46 > half.low > 0.44


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60))
def test_it_holds_its_mean_and_turned_round_is_its_mirror(counts):
    found = score([[sample < count for sample in range(8)] for count in counts])
    other = score([[sample >= count for sample in range(8)] for count in counts])
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0 and found.high > found.low
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))


POPULATIONS = {
    "a few that are always right": (0.03, lambda rng, items: rng.random(items) < 0.03),
    "always right or always wrong": (0.3, lambda rng, items: rng.random(items) < 0.3),
    "mostly hard": (0.1, lambda rng, items: rng.beta(0.1, 0.9, items)),
    "mostly easy": (0.95, lambda rng, items: rng.beta(0.475, 0.025, items)),
    "hopeless, hard and easy": (0.27, lambda rng, items: rng.choice([0.0, 0.3, 0.9], items, p=[0.5, 0.3, 0.2])),
    "of every kind": (0.5, lambda rng, items: rng.random(items)),
    "all alike": (0.1, lambda rng, items: np.full(items, 0.1)),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_its_interval_holds_the_truth_as_often_as_it_says(name):
    """AIME's shape, 30 questions of a population with 32 answers each, drawn 2,000 times; the standard error of that is 0.5 %."""
    truth, draw = POPULATIONS[name]
    rng = np.random.default_rng(0)
    ends = [over_items(rng.binomial(32, draw(rng, 30)) / 32) for _ in range(2000)]
    assert np.mean([low <= truth <= high for low, high in ends]) > 0.935
    # Nor is it idle: hardly wider than that of one answer a question.
    assert np.mean([high - low for low, high in ends]) < 0.03 + 2 * 1.96 * math.sqrt(truth * (1 - truth) / 30)


def test_it_is_students_interval_where_questions_are_many():
    counts = [(place * 7) % 33 for place in range(600)]
    found = score([[sample < count for sample in range(32)] for count in counts])
    deviation = math.sqrt(sum((count / 32 - found.mean) ** 2 for count in counts) / 599)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation / math.sqrt(600), rel=0.02)


def test_uneven_samples_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] answers each"):
        score([[True], [True, False]])
    with pytest.raises(ValueError, match="no answers each"):
        score([])


def test_mean_of_columns():
    columns = [score([[True]] * 50 + [[False]] * 50), score([[True]] * 20 + [[False]] * 80)]
    mean = mean_of(columns)
    assert mean.mean == pytest.approx(0.35)
    assert mean.low < 0.35 < mean.high and mean.high - mean.low < columns[0].high - columns[0].low

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.evaluation.score import mean_of, score, wilson


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
    assert together.high - together.low == pytest.approx(alone.high - alone.low, abs=0.03)
    assert score([[True] * 16 + [False] * 16] * 30).high == pytest.approx(0.5)  # no question differs from another


def test_bootstrap_is_the_same_again_and_near_the_normal_interval():
    counts = [(place * 7) % 33 for place in range(60)]
    verdicts = [[sample < count for sample in range(32)] for count in counts]
    one = score(verdicts)
    assert one == score(verdicts)
    means = [count / 32 for count in counts]
    deviation = math.sqrt(sum((mean - one.mean) ** 2 for mean in means) / 60)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * deviation / math.sqrt(60), rel=0.05)


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

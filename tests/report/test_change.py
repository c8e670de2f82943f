"""Changes over a run: the law is that an interval holds the truth about as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.report.change import between, change, change_over_seeds, difference_interval, mean_interval, smooth, student

values = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=80).map(np.array)


@pytest.mark.parametrize(("freedom", "outside", "known"), [
    (1, 0.05, 12.7062), (2, 0.05, 4.3027), (3, 0.05, 3.1824), (10, 0.05, 2.2281), (30, 0.01, 2.7500), (1e9, 0.05, 1.9600),
])  # fmt: skip
def test_students_quantiles_are_those_of_the_tables(freedom: float, outside: float, known: float) -> None:
    assert student(freedom, outside) == pytest.approx(known, rel=2e-4)


@pytest.mark.parametrize("iterations", [8, 50])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_run_without_a_trend_is_rarely_said_to_have_one(iterations: int, correlation: float) -> None:
    chance = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        noise, level = chance.normal(size=iterations + 20), 0.0
        for place in range(len(noise)):
            level = noise[place] = correlation * level + noise[place]
        wrong += change(noise[20:]).direction != 0
    assert wrong / 300 < 0.08  # 0.05 is promised


def test_a_trend_beyond_the_noise_is_found_with_its_size() -> None:
    chance = np.random.default_rng(2)
    found = change(np.linspace(0.1, 0.9, 50) + chance.normal(0, 0.05, 50))
    assert found.direction == 1 and found.compared == 10
    assert found.low < 0.64 < found.high  # from the middle of the first ten to that of the last ten


@given(values)
def test_the_interval_holds_the_difference_and_a_constant_moves_nothing(numbers: np.ndarray) -> None:
    found = change(numbers)
    assert found.low <= found.difference <= found.high or math.isclose(found.low, found.high, abs_tol=1e-9)
    moved = change(numbers + 100.0)
    assert moved.difference == pytest.approx(found.difference, abs=1e-6)


@given(values)
def test_backwards_the_change_is_the_opposite(numbers: np.ndarray) -> None:
    there, back = change(numbers), change(numbers[::-1])
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-6)


def test_too_few_values_tell_nothing() -> None:
    assert change(np.array([1.0, math.nan, 2.0, 3.0, 4.0, 5.0])) is None
    assert change(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])).direction == 0


def test_looking_at_more_widens_the_interval() -> None:
    numbers = np.random.default_rng(3).normal(size=40)
    one, four = (between(numbers, slice(0, 8), slice(-8, None), looked_at=count) for count in (1, 4))
    assert four.high - four.low > one.high - one.low


def test_seeds_are_the_sample() -> None:
    rising = [np.linspace(0, end, 10) for end in (0.9, 1.0, 1.1)]
    found = change_over_seeds(rising)
    assert found.seeds == 3 and found.direction == 1
    assert (found.low, found.high) == pytest.approx(mean_interval([each[-3:].mean() - each[:3].mean() for each in rising]))
    assert change_over_seeds(rising[:1]).seeds == 1


def test_one_seed_a_side_gives_no_interval() -> None:
    assert difference_interval([1.0], [2.0, 3.0]) == (-math.inf, math.inf)
    low, high = difference_interval([1.0, 1.1, 0.9], [2.0, 2.1, 1.9])
    assert 0 < low < 1 < high


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=40).map(np.array), st.integers(0, 10))
def test_smoothing_keeps_within_the_neighbours(numbers: np.ndarray, reach: int) -> None:
    for place, mean in enumerate(smooth(numbers, reach)):
        near = numbers[max(place - reach, 0) : place + reach + 1]
        near = near[~np.isnan(near)]
        assert np.isnan(mean) if not len(near) else near.min() - 1e-9 <= mean <= near.max() + 1e-9

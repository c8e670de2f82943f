"""Numbers and changes in words: short, with a true minus sign, and never claiming more than the interval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.report.change import Change
from megatron_spice.report.words import number, points, reward, share, told


@pytest.mark.parametrize(("value", "written"), [
    (0.0, "0"), (-0.0, "0"), (1e-13, "0"), (1.0, "1"), (0.5, "0.5"), (0.1234, "0.123"), (-3.14159, "\u22123.14"), (41.26, "41.3"), (1234.5, "1,234"),
    (0.00012, "1.2e\u221204"), (math.nan, "-"), (math.inf, "-"),
])  # fmt: skip
def test_numbers_have_three_digits(value: float, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize(("value", "written"), [(0.0, "0"), (0.0007, "0.07"), (0.012, "1.2"), (0.099, "9.9"), (0.4567, "46"), (1.0, "100")])
def test_shares_are_percent(value: float, written: str) -> None:
    assert share(value) == f"{written}\u00a0%"
    assert points(value) == f"{written} points"


@pytest.mark.parametrize(("value", "written"), [(0.0, "0.00"), (-0.0001, "0.00"), (-0.0038, "\u22120.004"), (0.326, "0.33")])
def test_rewards_show_their_side_of_zero(value: float, written: str) -> None:
    assert reward(value) == written


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1))
def test_a_change_is_claimed_only_where_the_interval_says_so(first: float, last: float, margin: float) -> None:
    found = Change(first, last, last - first - margin, last - first + margin, 5)
    words = told(found)
    assert ("rose" in words) == (found.direction > 0) and ("fell" in words) == (found.direction < 0)
    assert ("may be chance" in words) == (found.direction == 0 and not (margin == 0 and first == last))


def test_one_seed_has_no_interval() -> None:
    assert told(Change(0.1, 0.5, -math.inf, math.inf, 1)) == "went from 0.10 to 0.50 (one seed: no interval)"
    assert told(Change(0.1, 0.5, 0.3, 0.5, 5), share, points) == "rose from 10\u00a0% to 50\u00a0% (by 40 points; 95\u00a0% interval 30 to 50 points)"

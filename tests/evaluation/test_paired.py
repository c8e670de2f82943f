"""The change of a score: by hand, its laws, and how often its interval holds the truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.evaluation.paired import change, marks

MARKS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6)


def test_a_change_by_hand():
    found = change([{"a": 0.0, "b": 1.0, "c": 0.0}] * 2, [{"a": 1.0, "b": 1.0, "d": 1.0}, {"a": 1.0, "b": 0.0}])
    assert (found.mean, found.runs, found.items) == (0.25, 2, 2)
    # Squared errors: 0.0625 of the runs' means (0.5 and 0), 0.5625 of the questions' (1 and -0.5), 0.0625 of which are chance.
    margin = 12.7062 * math.sqrt(0.0625 + 0.5625 - 0.0625)
    assert (found.low, found.high) == pytest.approx((0.25 - margin, 0.25 + margin), rel=1e-3)


@settings(max_examples=20)
@given(st.lists(st.tuples(MARKS, MARKS), min_size=1, max_size=3))
def test_turned_round_it_is_the_negative(pairs):
    before, after = zip(*pairs)
    there, back = change(before, after), change(after, before)
    assert there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert change(before, before).high == 0.0


def test_it_is_narrower_than_the_scores_where_questions_differ():
    """Half of the questions are easy for both, the others hard for both: each score is uncertain, their difference is not."""
    easy = {str(number): float(number % 2) for number in range(100)}
    better = easy | {"0": 1.0, "2": 1.0}
    found = change([easy], [better])
    assert found.mean == pytest.approx(0.02) and -0.01 < found.low and found.high < 0.06


def test_one_question_gives_no_interval():
    found = change([{"a": 0.0}, {"a": 0.0}], [{"a": 1.0}, {"a": 0.0}])
    assert (found.mean, found.low, found.high, found.items) == (0.5, None, None, 1)


@pytest.mark.parametrize("same_before", [False, True])
@pytest.mark.parametrize(("runs", "spread"), [(2, 0.05), (3, 0.0), (3, 0.1), (5, 0.05)])
def test_its_interval_holds_the_truth_as_often_as_it_says(runs: int, spread: float, same_before: bool):
    """Questions of every difficulty, runs whose gains differ by `spread` around 0.1; 95 % of 300 asked, less twice the error of that."""
    rng, held = np.random.default_rng(0), 0
    names = [str(number) for number in range(200)]
    for _ in range(300):
        hard, gains = rng.uniform(0.0, 0.6, size=200), rng.normal(0.1, spread, size=runs).clip(-0.3, 0.4)
        first = [(rng.random(200) < hard).astype(float) for _ in gains]
        before = [dict(zip(names, first[0] if same_before else each)) for each in first]
        after = [dict(zip(names, (rng.random(200) < hard + gain).astype(float))) for gain in gains]
        found = change(before, after)
        held += found.low <= 0.1 <= found.high
    assert held >= 0.925 * 300


def test_nothing_in_common_is_an_error():
    for before, after in (([], []), ([{"a": 1.0}], [{"b": 1.0}])):
        with pytest.raises(ValueError, match="nothing can be compared"):
            change(before, after)


def test_marks_are_shares_of_right_answers(tmp_path):
    lines = [{"task": "x"}, {"id": "a", "answers": [{"correct": True}, {"correct": False}]}, {"id": "b", "answers": [{"correct": True}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert marks(tmp_path / "x.jsonl") == {"a": 0.5, "b": 1.0}

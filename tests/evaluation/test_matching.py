"""Verdicts beyond the verifier's rules: sequences and typing in text tasks, tolerances in mathematics."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.evaluation.gold import task_of
from megatron_spice.evaluation.items import make_items
from megatron_spice.evaluation.matching import elements, is_within, read_tolerances, verdict
from megatron_spice.evaluation.tasks import BY_NAME
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier

# (gold answer in the file, an extracted answer, whether it is right), all of kind "text".
TEXTS = [
    ("1 2 3 6 9 8 7 4 5", "9 8 7 6 5 4 3 2 1", False),
    ("1 2 3 6 9 8 7 4 5", "1 2 3 6 9 8 7 4 5", True),
    ("1 2 3 6 9 8 7 4 5", "1, 2, 3, 6, 9, 8, 7, 4, 5", True),
    ("1 2 3 6 9 8 7 4 5", "1 2 3 6 9 8 7 4", False),
    ("5 100", "5100", False),
    ("5 100", "5 100", True),
    ("1, 2, 3", "3, 2, 1", False),
    ("1, 2, 3", "1,2,3", True),
    ("1, 2, 3", "[1, 2, 3]", True),
    ("[0, 4, 5]", r"\left[0, 4.0, 5\right]", True),
    ("[0, 4, 5]", "[0, 4, 6]", False),
    ("['-48', '-27']", "[-48, -27]", True),
    ("1/2, 3/4", r"\frac{1}{2}, 0.75", True),
    ("1/2, 3/4", r"0.75, \frac{1}{2}", False),
    ("dog, cat", "dog,cat", True),
    ("dog, cat", "cat, dog", False),
    ("yes, no, yes", "Yes, No, Yes", True),
    ("5 km, 3 m", "5 m, 3 km", False),
    ("> ] )", ">])", True),
    ("> ] )", "> ) ]", False),
    ("} ]", r"\} ]", True),
    ("A", "(A)", True),
    ("A", "(B)", False),
    ("(A)", "A", True),
    ("(A), (C)", "A, C", True),
    ("1,234", "1234", True),
    ("1,234.50", "1234.5", True),
    ("2*x + 3", "3 + 2*x", True),
    ("New Delhi", "Delhi", False),
]


def test_text_answers():
    async def found() -> list[bool]:
        async with Verifier(VerifierConfig(workers=1, timeout=30.0)) as verifier:
            judged = [await verdict(verifier, Task("?", *task_of(gold, "text")), "text", (), answer) for gold, answer, _ in TEXTS]
            return [each.correct for each in judged]

    wrong = [case for case, correct in zip(TEXTS, asyncio.run(found()), strict=True) if case[2] != correct]
    assert wrong == []


def test_mathematics_stays_the_verifiers():
    """In mathematics a list of answers is a set, as MATH and OlympiadBench have it."""

    async def found() -> list[bool]:
        async with Verifier(VerifierConfig(workers=1, timeout=30.0)) as verifier:
            task = Task("?", *task_of("1, 2, 3", "mathematics"))
            assert task.answer_type == "Expression"
            return [(await verdict(verifier, task, "mathematics", (), answer)).correct for answer in ("3, 2, 1", "1, 2")]

    assert asyncio.run(found()) == [True, False]


@settings(max_examples=200)
@given(st.lists(st.integers(-999, 999).map(str) | st.sampled_from(["dog", "a cat", "x_1"]), min_size=2, max_size=6))
def test_elements_are_read_back_however_they_are_separated(found):
    for separator in (",", ", ", " , "):
        text = separator.join(found)
        for written in (text, f"[{text}]", f"({text})"):
            assert elements(written) in (found, None), written
            # Only what may be one number with commas between its thousands is no sequence.
            assert elements(written) is not None or separator == ","
    if all(each.lstrip("-").isdecimal() for each in found):
        assert elements(" ".join(found)) == found


@pytest.mark.parametrize(
    ("gold", "answer", "tolerances", "right"),
    [
        ("3.14", "3.15", (0.01,), True), ("3.14", "3.151", (0.01,), False), ("3.14", "3.13", (0.01,), True), ("5", "5.1 cm", (0.1,), True),
        ("5", "x = 4.9", (0.1,), True), (r"\frac{1}{2}", "0.49", (0.01,), True), ("0.5", "-1/2", (0.01,), False), ("0.5", r"\frac12", (0.01,), True),
        ("1, 20", "20.5, 1", (0.0, 0.5), True), ("1, 20", "1.5, 20", (0.0, 0.5), False), ("1, 20", "1.1, 20.1", (0.1,), True),
        ("1, 20", "1", (0.1,), False), ("1, 20", "1, 20", (0.1, 0.1, 0.1), False), ("1,234", "1235", (1.0,), True),
        ("3", "x=100, y=3", (0.1,), False), ("x=5, y=3", "3", (0.1,), False), ("5 km", "5 m", (0.1,), False),
        ("5 km", "5.05 km", (0.1,), True),
        ("$x = 5$, $y = 3$", "5.05, 3", (0.1,), True), ("x=5, y=3", "y=3, x=5", (0.1,), True), ("x=5, y=3", "x=3, y=5", (0.1,), False),
        ("x=3", "t = 3.05", (0.1,), True), ("3", "x=100 and y=3", (0.1,), False), ("1{,}234, 5", "5, 1234.05", (0.1,), True),
        (r"\(v_0 = 5\)", r"5.02\text{ m/s}", (0.1,), True), (r"30^\circ", "30.05 degrees", (0.1,), True), ("2", "2 pi", (0.1,), False),
        (r"5\text{ dollars}", r"\$5.05", (0.1,), True), ("\u20ac5", r"\$5.05", (0.1,), False),
        ("1/0", "1/0", (1.0,), False), ("5", "about 5", (1.0,), False), ("1, 1", "1, 1", (0.1,), True), ("1, 1", "1, 2", (0.1,), False),
    ],
)  # fmt: skip
def test_tolerances(gold, answer, tolerances, right):
    assert is_within(gold, answer, tolerances) is right


def test_olympiads_context_and_tolerance_are_read_where_a_row_has_them():
    rows = [
        {"question": "How far?", "final_answer": ["$3.1$"], "context": None, "error": None},
        {"question": "And then?", "final_answer": ["$3.1$"], "context": "A car goes.", "error": "1e-1"},
        {"question": "Which?", "final_answer": ["$3$", "$4$"], "context": "", "error": "0.5,"},
    ]
    first, second, third = make_items(BY_NAME["olympiad"], rows, {}, "rows")
    assert (first.task.question, first.tolerances) == ("How far?", ()) and "tolerances" not in first.as_json()
    assert (second.task.question, second.tolerances) == ("A car goes.\nAnd then?", (0.1,)) and second.as_json()["tolerances"] == [0.1]
    assert third.tolerances == (0.5, 0.0)
    assert make_items(BY_NAME["olympiad"], [{"question": "?", "answer": "3"}], {}, "rows")[0].tolerances == ()

    async def found() -> list[tuple[bool, str]]:
        async with Verifier(VerifierConfig(workers=1, timeout=30.0)) as verifier:
            judged = [await verdict(verifier, item.task, "mathematics", item.tolerances, "3.2") for item in (first, second)]
            return [(each.correct, each.reason) for each in judged]

    assert asyncio.run(found()) == [(False, "math"), (True, "tolerance")]
    with pytest.raises(ValueError, match="row 1 of rows: its tolerance is 'small', expected a number"):
        make_items(BY_NAME["olympiad"], [{**rows[0], "error": "small"}], {}, "rows")
    assert read_tolerances(float("nan")) == () and read_tolerances(0.25) == (0.25,)

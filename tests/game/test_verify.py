from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier

EQUAL = [
    ("Expression", "2*x^2 + 3*x - 5", "3x + 2x^2 - 5"),
    ("Expression", r"\frac{1}{2}", "0.5"),
    ("Expression", "1/2", "50%"),
    ("Expression", "(x+1)^2", "x**2 + 2*x + 1"),
    ("Expression", "pi*r^2", r"\pi r^{2}"),
    ("Expression", "sqrt(12)", r"2\sqrt{3}"),
    ("Expression", "x^10", "x^{10}"),
    ("Expression", r"\text{2x}", "$2x$"),
    *(("Expression", "18.90", money) for money in ("18.90 dollars", "18.9 USD", r"US\$18.90", r"\$18.9")),
    *(("Expression", "18.90", money) for money in ("\u20ac18.90", "\u00a318.90", "18.90 \u20ac")),
    ("Expression", r"18.90\text{ dollars}", r"18.90\text{ \$}"),
    ("Expression", r"18.90\text{ dollars}", "USD 18.9"),
    ("Expression", "3.5", "3.5 eggs"),
    ("Expression", r"5.5\text{ km}", "5.5 km"),
    ("Expression", r"30.5^\circ", "30.5 degrees"),
    ("Integer", "42", "+42"),
    ("Integer", "1,234", "1234"),
    ("String", "Gold Coast", r"\text{gold coast}."),
]
DIFFERENT = [
    ("Expression", "50", "50%"),
    ("Expression", "n!", "n"),
    ("Expression", "2*x", "2"),
    ("Expression", "x^10", "x^1*0"),
    ("Expression", "x", "y"),
    ("Expression", "18.90", "18.91 dollars"),
    ("Expression", r"18.90\text{ dollars}", "\u20ac18.90"),
    ("Expression", r"\$18.90", "\u20ac18.90"),
    ("Expression", "5.5 km", "5.5 m"),
    ("Expression", "2.5AB", "2.5ab"),
    ("Expression", "2.5", "2.5 pi"),
    ("Expression", "2.5ab", "2.5ac"),
    ("Expression", "0.5", "0.5%"),
    ("Expression", "3.5", "3.5 eggs or 4"),
    ("Integer", "42", "43"),
    ("Integer", "5", "-5"),
    ("String", "silent", "listen"),
    ("String", "Accra", "Accra Ghana"),
    ("String", "1", "11"),
]


@pytest.mark.parametrize(("kind", "left", "right"), EQUAL)
def test_equal_both_ways(judge, kind, left, right):
    assert judge(kind, left, right).correct
    assert judge(kind, right, left).correct


@pytest.mark.parametrize(("kind", "left", "right"), DIFFERENT)
def test_different_both_ways(judge, kind, left, right):
    assert not judge(kind, left, right).correct
    assert not judge(kind, right, left).correct


@pytest.mark.parametrize(
    ("gold", "answer", "correct", "reason"),
    [
        ("42", "42", True, "exact"),
        ("42", "42.0", True, "number"),
        ("42", r"42\text{ km}", True, "number"),
        ("12", "12 people", True, "number"),
        ("1234", r"1{,}234", True, "number"),
        ("3500000", "3.5 million", True, "number"),
        ("50", "50%", True, "number"),
        ("50", "0.5", False, "number"),
        ("42", r"6 \cdot 7", True, "math"),
        ("1024", "2^{10}", True, "math"),
        ("42", r"\frac{84}{2}", True, "math"),
        ("100000", "100000!", False, "different"),
        ("5", "5!", False, "different"),
        ("5", ".5", False, "math"),
        ("6", "six", False, "different"),
        ("18", "\u00a318", True, "number"),
        ("18", "18 euros", True, "number"),
        ("2", "2 pi", False, "different"),
        ("2", "2 squared", False, "different"),
        ("42", "42 or 43", False, "different"),
        ("42", "x = 42", True, "number"),
        ("1", "1 million", False, "number"),
        ("42", "", False, "no_answer"),
        ("42", None, False, "no_answer"),
        ("42", "4" * 2000, False, "too_long"),
    ],
)
def test_integer_rules(judge, gold, answer, correct, reason):
    verdict = judge("Integer", gold, answer)
    assert (verdict.correct, verdict.reason, verdict.extracted) == (correct, reason, answer)


def test_multiple_choice_goes_by_letter(judge):
    question = "When?\nA) 1957\nB) 1958\nC) 1959\nD) 1960"
    assert judge("MCQ", "B", r"\text{(B)}", question).correct
    assert judge("MCQ", "B", "1958", question).correct
    assert not judge("MCQ", "B", "1957", question).correct
    assert judge("MCQ", "B", "because", question).reason == "no_letter"


@settings(max_examples=60, deadline=None)
@given(number=st.integers(-(10**15), 10**15), other=st.integers(-(10**15), 10**15))
def test_integers_are_right_exactly_when_equal(loop, number, other):
    async def verdict(gold, answer):
        return await Verifier(VerifierConfig()).verify(Task("?", gold, "Integer"), answer)  # needs no worker

    for written in (str(other), f"{other:,}", f"{other}.0", f"${other}$"):
        assert loop.run_until_complete(verdict(f"{number:,}", written)).correct == (number == other)


def test_reading_an_expression(loop, verifier):
    outcomes = {
        text: loop.run_until_complete(verifier.read_expression(text))
        for text in ("2*x + 1", "x +", r"\frac{}{", "2*pi*r")
    }
    assert outcomes == {"2*x + 1": "ok", "x +": "unreadable", r"\frac{}{": "unreadable", "2*pi*r": "ok"}


def test_many_at_a_time_share_the_workers(loop, verifier):
    async def all_at_once():
        tasks = [Task("?", f"{n}*x", "Expression") for n in range(24)]
        return await asyncio.gather(*(verifier.verify(task, f"x*{n + n % 2}") for n, task in enumerate(tasks)))

    verdicts = loop.run_until_complete(all_at_once())
    assert [verdict.correct for verdict in verdicts] == [n % 2 == 0 for n in range(24)]


def test_asking_before_start_says_so():
    with pytest.raises(RuntimeError, match="not started"):
        asyncio.run(Verifier(VerifierConfig()).verify(Task("?", "x", "Expression"), "x+0"))


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(RuntimeError, match="memory_mb=1 "):
        asyncio.run(Verifier(VerifierConfig(memory_mb=1)).start())

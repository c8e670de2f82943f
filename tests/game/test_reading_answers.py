"""Numbers, letters, expressions: how written answers are read, without the verifier's worker."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.expression import looks_arithmetic, looks_mathematical, to_latex
from megatron_spice.game.numerals import is_integer, numbers_in, read_integer, read_quantity
from megatron_spice.game.options import letter_of, split_options, without_leaked_answer
from megatron_spice.game.text import normalise

QUESTION = "How far is it?\nA) 374 km\nB) 149 km\nC) 1,391 km\nD) 74 km"


@given(st.integers(-(10**30), 10**30))
def test_every_way_to_write_an_integer_is_read(number):
    assert read_integer(str(number)) == read_integer(f"{number:,}") == number
    for written in (
        f"{number:,}",
        f"{number:,}".replace(",", "{,}"),
        f"{number:,}".replace(",", " "),
        f"${number}$",
        f"{number}.0",
        f"\\text{{{number} km}}",
    ):
        assert read_quantity(written) == number
    assert number in numbers_in(f"There are {number:,} of them, or {number - 1}.")


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,23", "4.5", "six", "5!", "1e5", "--3", "\u0663", "1 000", "0x10", "9" * 5000]
)
def test_what_is_no_integer(text):
    assert not is_integer(text)
    with pytest.raises(ValueError):
        read_integer(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50%", 50), (r"50\%", 50), ("12 people", 12), ("5 km/h", 5), ("3.5 million", 3_500_000),
        ("2 thousand km", 2000),
        ("$1,200", 1200),
        ("0.5", Fraction(1, 2)), ("\u22124", -4), ("42.", 42),
        ("42 or 43", None), ("1 dozen", None), ("5!", None), ("100000!", None), ("2^{10}", None), ("about 5", None),
        ("", None), ("x", None),
        ("2 and a half", None), ("1/2", None), ("9" * 2_000_000, None),
    ],
)  # fmt: skip
def test_quantities(text, value):
    assert read_quantity(text) == value


def test_numbers_of_a_passage_are_whole_numbers():
    numbers = numbers_in(
        "In 1957, 33,846,114 people; 142 towns, 42.5 %, GDP 3.5 million, -7 degrees, 10-20 km, U2, 2010s."
    )
    assert numbers >= {1957, 33846114, 142, Fraction(85, 2), Fraction(7, 2), 3_500_000, -7, 10, 20, 2010}
    assert not numbers & {33, 846, 114, 42, 5, -20, 2}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("B)", "B"), ("(B)", "B"), ("B.", "B"), (r"\text{B}", "B"), (r"\textbf{(B)}", "B"),
        (r"$\mathrm{B}$", "B"),
        ("B) 149 km", "B"), ("B: 149 km", "B"), ("B. 149 km", "B"), ("(B) 149 km", "B"), (r"\text{B) 149 km}", "B"),
        ("**B**", "B"),
        ("Option B", "B"), ("The answer is B", "B"), ("answer: (b)", "B"), ("149 km", "B"), ("C: 2.4", "C"),
        ("E", None), ("A and B", None), ("A, B", None), ("A train", None), ("", None), ("150 km", None), ("AB", None),
        ("Because", None),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert letter_of(text, QUESTION) == letter


def test_options_on_lines_and_inline():
    stem, options = split_options(QUESTION)
    assert stem == "How far is it?" and options["C"] == "1,391 km"
    assert split_options("How far? A) 1 B) 2 C) 3 D) 4")[1] == {"A": "1", "B": "2", "C": "3", "D": "4"}
    assert split_options("How far?\nA. 1\nB. 2\nC. 3\nD. 4")[1]["D"] == "4"


@pytest.mark.parametrize(
    "question",
    [
        "How far?", "A) 1\nB) 2\nC) 3\nD) 4", "How far?\nA) 1\nB) 2\nC) 3", "How far?\nA) 1\nB) 2\nC) 3\nD) 4\nE) 5",
        "How far?\nA) 1\nB) 1\nC) 3\nD) 4", "How far?\nA) 1\nB) \nC) 3\nD) 4", "How far?\nB) 1\nA) 2\nC) 3\nD) 4",
    ],
)  # fmt: skip
def test_bad_options(question):
    assert split_options(question) is None


@pytest.mark.parametrize(
    "leak",
    ["\nCorrect: B", "\nCorrect answer: (B) 149 km", "\nAnswer: B", " (Correct: B)", "\nThe correct option is: B"],
)
def test_a_printed_answer_is_cut_off_the_question(leak):
    assert without_leaked_answer(QUESTION + leak) == QUESTION
    assert without_leaked_answer(QUESTION) == QUESTION


@pytest.mark.parametrize(
    "text",
    [
        "2*x^2 + 3*x - 5",
        r"\frac{1}{2}",
        "2*pi*r",
        "sqrt(x)",
        "E = m*c^2",
        "n!",
        "sin(x)",
        "x**2",
        "\u03c0r\u00b2",
        "50%",
    ],
)
def test_expressions(text):
    assert looks_mathematical(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "listen",
        "the area",
        "2*(x",
        "x)",
        "a; rm -rf",
        "x" * 300,
        "+",
        "import os",
        "(" * 50 + ")" * 50,
        "price * tax",
    ],
)
def test_what_is_no_expression(text):
    assert not looks_mathematical(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6*7", True), (r"6 \cdot 7", True), (r"\frac{84}{2}", True), ("5!", False), ("x", False), ("50%", False)],
)
def test_arithmetic(text, expected):
    assert looks_arithmetic(text) is expected


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("x**2", "x^2"),
        ("x^10", "x^{10}"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("2*pi*r", r"2*\pi *r"),
        (r"2\pi r", r"2\pi r"),
        (r"\sqrt{2}", r"\sqrt{2}"),
        ("50%", "(50/100)"),
    ],
)
def test_latex(text, latex):
    assert to_latex(text) == latex


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once or "\\" in text or "$" in text


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Accra.", "accra"),
        (r"\text{Gold Coast}", "gold  coast"),
        ("\uff21ccra", "accra"),
        ('"Accra"', "Accra"),
        (r"\textbf{\text{Accra}}", "Accra"),
        (r"R\&D", "r&d"),
    ],
)
def test_same_text(left, right):
    assert normalise(left) == normalise(right)

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.extract import answer_line, last_boxed

INNER = st.recursive(
    st.text(alphabet="abc123 +=", max_size=6),
    lambda inner: st.tuples(inner, inner, inner).map(lambda parts: parts[0] + "{" + parts[1] + "}" + parts[2]),
    max_leaves=6,
)
NOISE = st.text(alphabet="ab $\n", max_size=20)


@given(NOISE, INNER, NOISE, INNER, NOISE)
def test_the_last_box_is_read_with_its_braces(before, first, between, last, after):
    assert last_boxed(f"{before}\\boxed{{{first}}}{between}\\boxed{{{last}}}{after}") == last.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box", None),
        (r"\boxed{", None),
        (r"\boxed{5} then \boxed{6", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{x}", "x"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"{\boxed{\text{A}}}", r"\text{A}"),
        (r"} } \boxed{1}", "1"),
        (r"\boxed{}", ""),
    ],
)
def test_boxes(text, answer):
    assert last_boxed(text) == answer


def test_boxes_in_a_megabyte_take_no_time():
    start = time.perf_counter()
    assert last_boxed(r"\boxed{" * 150_000) is None
    assert last_boxed("{" * 500_000 + "}" * 500_000) is None
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Accra", "Accra"),
        (" Accra\nQuestion: x", "Accra"),
        ("Answer: B\n", "B"),
        ("", None),
        ("  \nAccra", None),
        (" 1,234 ", "1,234"),
    ],
)
def test_answer_lines(text, answer):
    assert answer_line(text) == answer

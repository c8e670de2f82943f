"""Verdicts on benchmarks' answers: the verifier's, and what their own graders allow beyond its rules.

Training's rules know four types of answers. Benchmarks have two things that are none of them:

- Sequences, in tasks of kind "text" (`[3, 1, 2]`, `9 8 7`, `dog, cat`). To Math-Verify numbers with spaces between are a product,
  and with commas a set; but there the order is the answer. So they are compared element by element, in their order, each by
  the verifier's rules. How commas are spaced, which separator numbers have, spaces between brackets alone (`> ] )`) and
  brackets around a single letter or around the whole are taken for typing.
- Tolerances, in OlympiadBench: how far from the gold number an answer may be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_spice.game.numerals import is_integer, read_quantity, read_with_unit
from megatron_spice.game.records import Task, Verdict
from megatron_spice.game.text import normalise
from megatron_spice.game.verify import Verifier

MOST_ELEMENTS = 200
"""Of a longer sequence only the text is compared."""
_BRACKETS_ONLY = re.compile(r"[()\[\]{}<>\\\s]+")
_ONE_LETTER = re.compile(r"[(\[]([^\W\d_])[)\]]")
_WITHOUT_SIZES = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_LETTERS = re.compile(r"\\[a-z]+|([a-z]+)")
_DELIMITED = re.compile(r"\s*(?:\$+|\\\(|\\\[)(.*)(?<!\\)(?:\$+|\\\)|\\\])\s*", re.DOTALL)
_NAME = re.compile(r"\s*((?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]{1,20}\}))?(?:\([^()=]{1,20}\))?)\s*=")
_COMMA = re.compile(r"(?<!\\),(?!\\!)(?![^{]*\})")  # neither a space of LaTeX's, nor one of its thousands, nor within braces
_FRACTION = re.compile(r"([+-]?)\s*(?:\\[dt]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?|(\d+)\s*/\s*(\d+))")


async def verdict(verifier: Verifier, task: Task, kind: str, tolerances: Sequence[float], answer: str | None) -> Verdict:
    """The verdict on an extracted answer. `reason` is the verifier's, or "sequence", "form" or "tolerance" where it is these rules
    that have found it right.

    Args:
        kind: the benchmark's, "mathematics" or "text".
        tolerances: one for each number of the gold answer, or one for all; empty for none.
    """
    found = await verifier.verify(task, answer)
    if found.correct or found.reason in ("no_answer", "too_long"):
        return found
    if kind == "text" and task.answer_type == "String":
        if bare(answer) == bare(task.gold_answer):
            return Verdict(True, answer, "form")
        if await _same_elements(verifier, task.gold_answer, answer):
            return Verdict(True, answer, "sequence")
    if tolerances and is_within(task.gold_answer, answer, tolerances):
        return Verdict(True, answer, "tolerance")
    return found


def bare(text: str) -> str:
    """The form in which two texts are compared exactly: the verifier's, without what is taken for typing."""
    text = re.sub(r"\s*,\s*", ",", normalise(_WITHOUT_SIZES.sub("", text)))
    if _BRACKETS_ONLY.fullmatch(text):
        return re.sub(r"[\s\\]", "", text)
    letter = _ONE_LETTER.fullmatch(text)
    return letter[1] if letter else text


def elements(text: str) -> list[str] | None:
    """The elements of a sequence: what has commas and is no number, or numbers with spaces between; None for anything else."""
    text = normalise(_WITHOUT_SIZES.sub("", text))
    if text[:1] + text[-1:] in ("[]", "()") and not re.search(r"[()\[\]]", text[1:-1]):
        text = text[1:-1].strip()
    by_spaces = text.split()
    if "," not in text:
        return by_spaces if len(by_spaces) > 1 and all(map(_is_number, by_spaces)) else None
    return None if len(by_spaces) == 1 and _is_number(text) else [bare(each) for each in text.split(",")]


def _is_number(text: str) -> bool:
    """A number alone, perhaps with commas between its thousands."""
    return re.fullmatch(r"[+-]?[\d.,]+", text) is not None and read_quantity(text) is not None


async def _same_elements(verifier: Verifier, gold: str, answer: str) -> bool:
    wanted, given = elements(gold), elements(answer)
    if wanted is None or given is None or len(wanted) != len(given) or len(wanted) > MOST_ELEMENTS:
        return False
    for one, other in zip(wanted, given, strict=True):
        if one == other:
            continue
        if not re.search(r"\d", one) or _letters(one) != _letters(other):  # units are no decoration where each element has its own
            return False
        by_rule = Task("", one, "Integer" if is_integer(one) else "Expression")
        if not (await verifier.verify(by_rule, other)).correct:
            return False
    return True


def _letters(text: str) -> list[str]:
    return sorted(filter(None, _LETTERS.findall(text)))


def read_tolerances(value: Any) -> tuple[float, ...]:
    """What a field says of how far an answer may be from the gold one: a number, or several with commas between; () for nothing.

    Raises:
        ValueError: it is something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        return ()
    try:
        found = tuple(float(each) if each.strip() else 0.0 for each in str(value).split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= each < math.inf for each in found):
        raise ValueError(f"its tolerance is {value!r:.60}, expected a number such as 0.01, or several with commas between")
    return found


def is_within(gold: str, answer: str, tolerances: Sequence[float]) -> bool:
    """Whether the numbers of an answer are those of the gold one within their tolerances, in any order where there are several.

    Numbers are decimals, with or without a unit, and fractions, each perhaps as the value of a name (`x = 5`); other expressions are
    the verifier's to compare. Where both have a unit, and of several numbers where both have a name, it must be the same.
    """
    wanted, left = _values(gold), _values(answer)
    if None in wanted or None in left or len(wanted) != len(left):
        return False
    allowed = [*tolerances] * (len(wanted) if len(tolerances) == 1 else 1)
    if len(allowed) != len(wanted):
        return False
    for one, tolerance in zip(wanted, allowed, strict=True):
        match = next((each for each in left if _is_near(one, each, tolerance, len(wanted) > 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


@dataclass(frozen=True, slots=True)
class _Value:
    number: Fraction
    unit: str
    name: str


def _is_near(one: _Value, other: _Value, tolerance: float, by_name: bool) -> bool:
    pairs = [(one.unit, other.unit), *([(one.name, other.name)] if by_name else [])]
    return abs(one.number - other.number) <= Fraction(str(tolerance)) and all(a == b or not a or not b for a, b in pairs)


def _values(text: str) -> list[_Value | None]:
    whole = _value(text)
    return [whole] if whole is not None else [_value(each) for each in _COMMA.split(text)]


def _value(text: str) -> _Value | None:
    text, name = (whole[1] if (whole := _DELIMITED.fullmatch(text)) else text).strip(), ""
    if found := _NAME.match(text):
        text, name = text[found.end() :].strip(), re.sub(r"\s", "", found[1])
    quantity = read_with_unit(text)
    if quantity is not None:
        return _Value(*quantity, name)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = match[2] or match[4], match[3] or match[5]
    if max(len(above), len(below)) > 300 or int(below) == 0:
        return None
    return _Value(Fraction(int(above), int(below)) * (-1 if match[1] == "-" else 1), "", name)

"""From a benchmark's gold answer to a task of the game: what is compared, and by which of the verifier's rules.

One rule for all benchmarks, by the answer's own form, because public files write the same thing in many ways:
a number after `####` (GSM8K), a box in a worked solution (MATH, Minerva), a list of answers (OlympiadBench), a float that is
whole (AMC), a letter in parentheses (BBEH), 4.5e33 (Minerva).
"""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_spice.evaluation.matching import elements
from megatron_spice.game.expression import looks_mathematical
from megatron_spice.game.extract import last_boxed
from megatron_spice.game.numerals import is_integer, read_quantity
from megatron_spice.game.records import AnswerType
from megatron_spice.game.text import strip_latex

_LETTER = re.compile(r"\(([A-Z])\)")
_ONLY_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")


def read_gold(value: Any) -> str:
    """The gold answer in a field: its text, without the reasoning that may stand before it.

    Raises:
        ValueError: there is none, or it is of a kind that is not compared.
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = _list_in(value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("an empty list of answers")
        return ", ".join(read_gold(each) for each in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"a {type(value).__name__}, expected a text or a number")
    if isinstance(value, float):
        value = str(int(value)) if value == int(value) else repr(value)
    text = str(value).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif (boxed := last_boxed(text)) is not None:
        text = boxed
    if not text:
        raise ValueError("an empty answer")
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text


def _list_in(text: str) -> Any:
    """A list of strings that a file keeps as text; the text itself if it is something else, such as an interval."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if all(isinstance(each, str) for each in found) and found else text


def task_of(gold: str, kind: str) -> tuple[str, AnswerType]:
    """The gold answer as the verifier takes it, and the rule it goes by.

    Whole numbers, with a unit or not, are Integer, other numbers Expression; a letter in parentheses is MCQ; words are String; what
    can be read as mathematics is Expression; anything else is String. Of `kind` "text" only what has a digit or an operator is
    Expression, and no sequence, which is a String (`matching.py` compares its elements).
    """
    if letter := _LETTER.fullmatch(strip_latex(gold)):
        return letter[1], "MCQ"
    if is_integer(gold):
        return gold, "Integer"
    if kind == "text" and elements(gold) is not None:
        return gold, "String"
    number = read_quantity(gold)
    if number is not None:
        return (str(number), "Integer") if number.denominator == 1 else (gold, "Expression")
    plain = strip_latex(gold)
    if _ONLY_WORDS.fullmatch(plain) and (kind == "text" or len(plain) > 2):
        return gold, "String"
    if looks_mathematical(gold) and (kind == "mathematics" or re.search(r"[0-9=^*/+]", gold)):
        return gold, "Expression"
    return gold, "String"

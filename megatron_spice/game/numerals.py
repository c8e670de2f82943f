"""Numbers as people write them: `1,234`, `12 000`, `12{,}000`, `3.5 million`, exactly and without evaluating anything.

Both sides of the game need it. Grounding asks whether a number stands in a passage as a whole number (42 is not in
142 nor in 42.5), the verifier whether a Reasoner's integer is the gold one; neither needs a computer algebra system,
and the one that is used for the rest takes `100000!` for 100000 and 0.5 for 50 %. Values are `Fraction`s: no
rounding.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_spice.game.text import strip_latex

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = r"(?:\s+(hundred|thousand|million|billion|trillion)\b)?"
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_MENTION = re.compile(rf"(?<![\w.,])({_DIGITS})(?!,?[0-9]){_SCALE}", re.IGNORECASE)
# A number with its unit: at most three words, a currency in front or behind, a percent sign behind.
# The letters that no unit has to itself are variables: 42x is not 42.
_UNIT = (
    r"(?:\s*(?:%|percent|[\u20ac\u00a3]|(?:\u00b0|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?)\s*(?:[CFK](?![a-z]))?"
    r"|(?!(?-i:[abcefijknpqruvwxyz])(?![a-z]))[a-z]+(?:[/^](?:[a-z0-9]+|\{[0-9]\}))*\.?(?:\s+[a-z]+\.?){0,2}))?"
)
_QUANTITY = re.compile(rf"([+-]?)\s*((?:usd?|eur|gbp)?\s*[\u20ac\u00a3]?)\s*({_DIGITS}){_SCALE}{_UNIT}", re.IGNORECASE)
_DOLLAR_SIGN = re.compile(r"\bus\s*\\*\$|\\\$", re.IGNORECASE)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?")
_SAME_UNITS = {
    "$": r"(?:us )?dollars?|usd", "\u20ac": "euros?|eur", "\u00a3": "pounds?(?: sterling)?|gbp", "%": "per ?cent", "\u00b0": "degrees?",
}  # fmt: skip
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})
_NUMBER_WORDS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|and|or|to|plus|minus|times)\b", re.I
)
_NO_UNIT = re.compile(r"\s*(?:pi|squared|cubed|factorial)\b", re.I)  # behind the number itself
_MOST_DIGITS = 1000


def is_integer(text: str) -> bool:
    """Whether `text` is a plain decimal integer, thousands commas (well placed) allowed."""
    return len(text) <= _MOST_DIGITS and _INTEGER.fullmatch(text) is not None


def read_integer(text: str) -> int:
    """The value of a plain integer.

    Raises:
        ValueError: `text` is not one (`is_integer` tells).
    """
    if not is_integer(text):
        raise ValueError(f"not a plain integer: {text[:40]!r}")
    return int(text.replace(",", ""))


def _value(digits: str, scale: str | None) -> Fraction | None:
    digits = digits.replace(",", "").replace(" ", "")
    if len(digits) > _MOST_DIGITS:
        return None
    return Fraction(digits) * _SCALES[scale.lower()] if scale else Fraction(digits)


def read_quantity(text: str) -> Fraction | None:
    """The number in an answer that is one number, with or without a unit behind it; None when it is anything else.

    `42`, `42.0`, `$1{,}234$`, `5\\text{ km}`, `50%` (the percent sign is a unit: 50), `3.5 million people`.
    `42 or 43`, `six`, `100000!`, `2^{10}` are not quantities.
    """
    found = read_with_unit(text)
    return None if found is None else found[0]


def read_with_unit(text: str) -> tuple[Fraction, str] | None:
    """`read_quantity`, and the unit, "" for none. Currencies are signs (`18.90 USD` has `$`), other words are in small letters; what may
    be variables is left as it is."""
    has_dollars = bool(_DOLLAR_SIGN.search(text)) or text.replace("\\$", "").count("$") % 2 == 1  # two are mathematics
    text = strip_latex(text.translate(_MINUS).replace("{,}", ",").replace("\\,", " ").replace("\\$", ""))
    text = " ".join(text.split()).rstrip(".")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    sign, before, digits, scale = match.groups()
    rest = text[match.end(4) if scale else match.end(3) :]
    if _NUMBER_WORDS.search(rest) or _NO_UNIT.match(rest):
        return None
    value = _value(digits, scale)
    unit = _unit("$" if has_dollars else before, rest)
    return None if value is None else (-value if sign == "-" else value, unit)


def _unit(before: str, behind: str) -> str:
    """In one spelling."""
    text = _DEGREES.sub("\u00b0", f"{before} {behind}").replace(".", " ")
    words = [word.casefold() if len(word) > 2 else word for word in text.split()]
    unit = " ".join(words)
    for sign, names in _SAME_UNITS.items():
        unit = re.sub(rf"(?:{re.escape(sign)} *)?\b(?:{names})\b", sign, unit, flags=re.IGNORECASE)
    return unit


def numbers_in(text: str) -> set[Fraction]:
    """Every number mentioned in `text`, as a whole number and, before a word such as million, also scaled by it."""
    text = text.translate(_MINUS)
    found: set[Fraction] = set()
    for match in _MENTION.finditer(text):
        digits, scale = match.groups()
        start = match.start(1)
        # "-5" is negative, the 20 of "10-20" and of "T-20" is not.
        negative = text[start - 1 : start] == "-" and not text[max(start - 2, 0) : start - 1].isalnum()
        for value in {_value(digits, None), _value(digits, scale)} - {None}:
            found.add(-value if negative else value)
    return found

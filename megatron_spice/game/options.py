"""Multiple choice: finding the four options in a question, and the letter in whatever a model writes for one.

Letters come as `B`, `(b)`, `B.`, `\\text{B}`, `B) 374 km`, `C: 2.4`, `Option B` or as the option's own text. Taking any
capital A to D found in an answer would be lenient to nonsense; taking only a bare letter makes right answers wrong. The
forms are listed, anything else has no letter.
"""

from __future__ import annotations

import re

from megatron_spice.game.text import normalise, strip_latex

LETTERS = ("A", "B", "C", "D")
_LINE_MARK = re.compile(r"^[ \t]*\(?([A-Z])[).:](?=\s)[ \t]*", re.MULTILINE)
_INLINE_MARK = re.compile(r"(?<!\S)\(?([A-Z])\)\s*")
_LEAK = re.compile(
    r"\s*\(?\b(?:the\s+)?(?:correct(?:\s+(?:answer|option|letter))?|answer)\s*(?:is\s*)?[:=]\s*\(?[A-D]\b.*\Z",
    re.I | re.S,
)
_BARE = re.compile(r"\(?([A-Da-d])\)?[).:]?")
_WITH_TEXT = re.compile(r"(?:\(([A-D])\)|([A-D])[).:])\s*\S.*", re.DOTALL)
_NAMED = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|answer|choice)(?:\s+is)?\s*:?\s+(.+)", re.IGNORECASE | re.DOTALL
)


def without_leaked_answer(question: str) -> str:
    """`question` less a trailing `Correct: B`: the Challenger may print it, the Reasoner must not see it."""
    return _LEAK.sub("", question).strip()


def split_options(question: str) -> tuple[str, dict[str, str]] | None:
    """Stem and options of a multiple choice question, None unless there are four different ones, A) to D), after a
    stem."""
    for mark in (_LINE_MARK, _INLINE_MARK):
        marks = list(mark.finditer(question))
        if [match.group(1) for match in marks] != list(LETTERS):
            continue
        ends = [match.start() for match in marks[1:]] + [len(question)]
        texts = [question[match.end() : end].strip() for match, end in zip(marks, ends)]
        stem = question[: marks[0].start()].strip()
        if stem and all(texts) and len({normalise(text) for text in texts}) == len(LETTERS):
            return stem, dict(zip(LETTERS, texts))
    return None


def letter_of(text: str, question: str = "") -> str | None:
    """The letter that an answer stands for, None when it has none. `question` lets an option's own text count."""
    text = " ".join(strip_latex(text).split()).strip("*`'\" ")
    named = _NAMED.fullmatch(text)
    text = named.group(1) if named else text
    match = _BARE.fullmatch(text)
    if match:
        return match.group(1).upper()
    match = _WITH_TEXT.fullmatch(text)
    if match:
        return match.group(1) or match.group(2)
    split = split_options(question)
    if split:
        for letter, option in split[1].items():
            if normalise(option) == normalise(text):
                return letter
    return None

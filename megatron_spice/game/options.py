"""Multiple choice: finding the options in a question, and the letter in whatever a model writes for one.

Letters come as `B`, `(b)`, `B.`, `\\text{B}`, `B) 374 km`, `C: 2.4`, `Option B` or as the option's own text. Taking any
capital found in an answer would be lenient to nonsense; taking only a bare letter makes right answers wrong. The
forms are listed, anything else has no letter. A task of the game has four options, one of a benchmark up to 26.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_spice.game.text import normalise, strip_latex

LETTERS = ("A", "B", "C", "D")
_LINE_MARK = re.compile(r"^[ \t]*\(?([A-Z])[).:](?=\s)[ \t]*", re.MULTILINE)
_INLINE_MARK = re.compile(r"(?<!\S)\(?([A-Z])\)\s*")
_LEAK = re.compile(
    r"\s*\(?\b(?:the\s+)?(?:correct(?:\s+(?:answer|option|letter))?|answer)\s*(?:is\s*)?[:=]\s*\(?[A-D]\b.*\Z",
    re.I | re.S,
)
_BARE = re.compile(r"[({]?([A-Za-z])[)}]?[).:,;!]?")
_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s*\S.*", re.DOTALL)
_BEFORE_TEXT = re.compile(r"([A-Z])(?:\s*[-,=]\s*|\s+)(.+)", re.DOTALL)
_NAMED = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|answer|choice)(?:\s+is)?\s*:?\s+(.+)", re.IGNORECASE | re.DOTALL
)


def without_leaked_answer(question: str) -> str:
    """`question` less a trailing `Correct: B`: the Challenger may print it, the Reasoner must not see it."""
    return _LEAK.sub("", question).strip()


def split_options(question: str) -> tuple[str, dict[str, str]] | None:
    """Stem and options of a multiple choice question, None unless there are four different ones, A) to D), after a
    stem."""
    found = options_in(question)
    return found if found and len(found[1]) == len(LETTERS) else None


def options_in(question: str) -> tuple[str, dict[str, str]] | None:
    """Stem and options of a question with any number of different ones, A) and on, at least two, after a stem."""
    for mark in (_LINE_MARK, _INLINE_MARK):
        marks = list(mark.finditer(question))
        letters = [match.group(1) for match in marks]
        if len(marks) < 2 or letters != [chr(ord("A") + place) for place in range(len(marks))]:
            continue
        ends = [match.start() for match in marks[1:]] + [len(question)]
        texts = [question[match.end() : end].strip() for match, end in zip(marks, ends)]
        stem = question[: marks[0].start()].strip()
        if stem and all(texts) and len({normalise(text) for text in texts}) == len(texts):
            return stem, dict(zip(letters, texts))
    return None


def letter_of(text: str, question: str = "", gold: str = "") -> str | None:
    """The letter that an answer stands for, None when it has none.

    Args:
        question: its options say which letters there are (A to D if it has none that can be read), and let an option's own
            text count.
        gold: the right letter, if it is known: it and those before it are there, whatever can be read.
    """
    split = options_in(question)
    options = split[1] if split else {}
    last = max([*(options or LETTERS), gold.strip()[:1].upper()])
    text = " ".join(strip_latex(unicodedata.normalize("NFKC", text)).split()).strip("*`'\" ")
    for _ in range(2):  # as in `The answer is option B`
        named = _NAMED.fullmatch(text)
        text = named.group(1).strip("*`'\" ") if named else text
    # An option's own text may begin as a letter does (`E. coli`), or be one (the variable `x`).
    spelled = next((letter for letter, option in options.items() if normalise(option) == normalise(text)), None)
    if (match := _BARE.fullmatch(text)) and match[1].upper() <= last:
        return match[1].upper()
    if spelled is not None:
        return spelled
    if match := _WITH_TEXT.fullmatch(text):
        letter = match[1] or match[2]
        return letter if letter <= last else None
    match = _BEFORE_TEXT.fullmatch(text)
    if match and match[1] in options and normalise(match[2]).strip("()") == normalise(options[match[1]]):
        return match[1]
    return None

"""Where a Reasoner's completion keeps its final answer: the last complete `\\boxed{...}`, or the line after
`Answer:`."""

from __future__ import annotations

import re

# Backslashes come doubled from models that write their answer as JSON would.
_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_LABEL = re.compile(r"(?:\s*Answer\s*:)?[ \t]*", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces close, None when there is none.

    Of nested boxes the inner one counts, an escaped brace does not. One pass, whatever the text.
    """
    opened: list[tuple[int, bool]] = []
    best = (-1, -1)
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}":
            if opened:
                start, is_box = opened.pop()
                if is_box and start > best[0]:
                    best = (start, match.start())
        elif token == "{" or token.endswith("{") and len(token) > 2:
            opened.append((match.end(), token != "{"))
    return text[best[0] : best[1]].strip() if best[0] >= 0 else None


def answer_line(text: str) -> str | None:
    """The first line of a completion that goes on from `Answer:`, None when it is empty. Of a line with a box in it the box
    counts: models that were trained to box do so unasked."""
    line = text[_LABEL.match(text).end() :].split("\n", 1)[0].strip()
    return last_boxed(line) or line or None

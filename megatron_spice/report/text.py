"""Texts of a model and of a corpus, made fit to be shown: they may hold anything.

What a reader cannot see but a browser obeys (control characters, marks that turn the direction of writing, characters of
no width) is shown by its number. Escaping is the templates' affair.
"""

from __future__ import annotations

import re
import unicodedata

SHOWN_AS_THEY_ARE = "\n\t"
# Of the format characters, those that join letters into others are part of ordinary writing.
JOINERS = "\u200c\u200d"


def visible(text: object) -> str:
    """The text with every character that cannot be seen written as a number in brackets."""
    return re.sub(r"[^\x20-\x7e\u00a1-\u00ac\u00ae-\u02ff]", _shown, str(text))


def one_line(text: object, longest: int) -> str:
    """The text on one line, cut to `longest` characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "\u2026"


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    if not hidden or character in SHOWN_AS_THEY_ARE or character in JOINERS:
        return character
    return f"[U+{ord(character):04X}]"

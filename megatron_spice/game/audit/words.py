"""The words of a text as the audits compare them: case folded, without punctuation."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+(?:[.,]\d+)*")


def words(text: str) -> list[str]:
    """Words and numbers in order: `1,957.5` is one, punctuation none."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())

"""Characters on which two tokenizers may disagree although both are right: those that Unicode gave out lately.

How a text is split into words depends on which characters are letters, and every library carries the tables of the Unicode
version it was made with. A character that this Python's tables (Unicode 13 to 15) do not know is a letter for one library and
not yet one for another. Texts that hold one are rare; they are found here and left to the tokenizer that defines the ids.

Looking at every character of every text would cost as much as encoding it. So the tokens are looked at instead, which are
four times fewer and are there anyway: `doubtful_tokens` marks those that hold such a character or end in the midst of what
may become one, and only texts with such a token are looked at closely.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_PLANE = 0x10000
_ASCII = bytes(range(128))
_SHORTEST = {2: 0x80, 3: 0x800, 4: 0x10000}  # smallest code point by length in UTF-8


@cache
def disputed() -> np.ndarray:
    """Whether each code point is unassigned in this Python's Unicode tables, bool [0x110000]."""
    table = np.zeros(17 * _PLANE, dtype=bool)
    for plane in (0, 1, 2, 3, 14):
        table[plane * _PLANE : (plane + 1) * _PLANE] = [
            unicodedata.category(chr(point)) == "Cn" for point in range(plane * _PLANE, (plane + 1) * _PLANE)
        ]
    table[4 * _PLANE : 14 * _PLANE] = True
    return table


def has_disputed(text: str) -> bool:
    """Whether a text holds a disputed character."""
    if text.isascii():
        return False
    others = text.encode().translate(None, delete=_ASCII).decode()  # mostly few: the rest costs a byte's time each
    if len(others) < 16:
        return any(map(disputed().__getitem__, map(ord, others)))
    return bool(disputed()[np.frombuffer(others.encode("utf-32-le"), dtype="<u4")].any())


def doubtful_tokens(tokens: Sequence[bytes]) -> np.ndarray:
    """Which tokens can take part in spelling a disputed character, bool [tokens]."""
    return np.fromiter(map(_is_doubtful, tokens), dtype=bool, count=len(tokens))


def _is_doubtful(token: bytes) -> bool:
    if token.isascii():
        return False
    try:
        return has_disputed(token.decode())
    except UnicodeDecodeError:  # parts of characters
        return has_disputed(token.decode(errors="ignore")) or _may_become_disputed(token)


def _may_become_disputed(token: bytes) -> bool:
    """Whether a token ends with the first bytes of a character that could be disputed."""
    for taken in range(1, min(3, len(token)) + 1):
        lead = token[-taken]
        if lead < 0x80:
            return False
        if lead >= 0xC0:
            break
    else:
        return False
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if taken >= length:  # the character is whole
        return False
    first = lead & (0x7F >> length)
    for byte in token[len(token) - taken + 1 :]:
        first = first << 6 | byte & 0x3F
    bits = 6 * (length - taken)
    return bool(disputed()[max(first << bits, _SHORTEST[length]) : first + 1 << bits].any())

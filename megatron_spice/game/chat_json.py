"""The JSON object in a model's free text: the last one at top level, wherever prose or code fences stand around it.

Models write LaTeX into JSON strings without doubling the backslash. `"\\frac"` then is either no JSON at all or,
worse, a form feed and `rac`; backslashes that cannot be meant as escapes are therefore doubled before reading.
"""

from __future__ import annotations

import json
import re
from typing import Any

# What may be meant as an escape is kept; b, f, r, t before a letter begin a LaTeX command far more often than a tab.
_ESCAPE = re.compile(r'\\(\\|"|/|u[0-9a-fA-F]{4}|n(?!eq\b|abla\b|u\b|otin\b)|[bfrt](?![a-zA-Z]))|\\')
_DECODER = json.JSONDecoder(strict=False)
_MOST_STARTS = 2000


def last_object(text: str) -> dict[str, Any] | None:
    """The last top-level JSON object of `text`, None when there is none."""
    text = _ESCAPE.sub(lambda match: match.group() if match.group(1) else r"\\", text)
    found: dict[str, Any] | None = None
    position = text.find("{")
    for _ in range(_MOST_STARTS):
        if position < 0:
            break
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            found = value
        position = text.find("{", end)
    return found

"""Where to cut a document into passages: as late as fits, at the best kind of place there is.

A cut lies between two tokens of the document, so passages are slices of the tokenisation of the whole document and
every token of a passage is one that the document has. The best place is the end of a paragraph, then of a sentence,
then of a word, then of a character; it is looked for in the second half of the longest passage that fits, so that a
good place does not buy a stump. Sizes are tokens; places in the text are bytes: a token may be part of a character.
"""

from __future__ import annotations

import re

import numpy as np

# Group 1 is the gap: a token that begins in it, or right after it, begins the next passage. Both ends are needed since
# vocabularies disagree on whether a space belongs to the word after it.
_PARAGRAPH = re.compile(rb"\n([ \t\r]*\n\s*)")
_SENTENCE = re.compile(
    rb"(?:[.!?][\"')\]]*(?=\s)"
    rb"|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f"  # the ideographic full stop, the full-width ! and ?
    rb"|(?=\n))(\s*)"
)
_WORD = re.compile(rb"(\s+)")
_LOOK_PAST = 64  # bytes after the last place allowed, for patterns that look ahead
_STRETCHES = (512, 4096, 1 << 62)  # bytes looked through at once, backwards


def cut(text: bytes, starts: np.ndarray, max_tokens: int, min_tokens: int = 1) -> list[tuple[int, int]]:
    """Cut a document into passages.

    Args:
        text: the document as the bytes of its tokens, end to end.
        starts: where each token begins in `text`, ascending, [tokens].
        max_tokens: most tokens of a passage.
        min_tokens: fewest; a shorter document has no passage, and a longer one is cut early rather than leave less.

    Returns:
        (offset, length) of each passage in tokens, in order. They follow each other without gap or overlap and cover
        the document, unless the document (or, when min_tokens is over half of max_tokens, its end) is too short.
    """
    total = len(starts)
    passages = []
    first = 0
    while total - first > max_tokens:
        latest = first + max_tokens
        early = first + max(min_tokens, (max_tokens + 1) // 2)
        latest_with_end = min(latest, total - min_tokens)
        if latest_with_end >= early:
            latest = latest_with_end
        place = _best_place(text, starts, (first + min_tokens, early, latest))
        passages.append((first, place - first))
        first = place
    if total - first >= min_tokens and total > first:
        passages.append((first, total - first))
    return passages


def _best_place(text: bytes, starts: np.ndarray, window: tuple[int, int, int]) -> int:
    """Number of the token before which to cut: (first allowed, first good, last) as numbers of tokens."""
    allowed, earliest, latest = window
    for pattern in (_PARAGRAPH, _SENTENCE, _WORD):
        place = _last_gap(pattern, text, starts, earliest, latest)
        if place is not None:
            return place
    for place in range(latest, allowed - 1, -1):
        if text[starts[place]] & 0xC0 != 0x80:  # not in the middle of a UTF-8 character
            return place
    return latest


def _last_gap(pattern: re.Pattern[bytes], text: bytes, starts: np.ndarray, earliest: int, latest: int) -> int | None:
    """Number of the last token from `earliest` to `latest` that begins a passage after a gap; None if there is none.

    The text is gone through from its end, in stretches that grow, since the last gap is mostly near.
    """
    first, last = int(starts[earliest - 1]), int(starts[latest])
    end = last + _LOOK_PAST
    for stretch in _STRETCHES:
        begin = _unmatched_byte(text, first, last - stretch)
        found = None
        for match in pattern.finditer(text, begin, end):
            low, high = match.span(1)
            if low > last:
                break
            end_of_gap = starts.dtype.type(high)  # of another type, numpy would copy all starts
            place = min(int(starts.searchsorted(end_of_gap, side="right")) - 1, latest)
            if place >= earliest and starts[place] >= low:
                found = place
        if found is not None or begin == first:
            return found
    raise AssertionError("the last stretch reaches back to the beginning")


def _unmatched_byte(text: bytes, first: int, place: int) -> int:
    """A place at or before `place` to look for gaps from: at a letter or digit, which is in no match of any pattern."""
    for before in range(place, place - _LOOK_PAST, -1):
        if before <= first:
            return first
        if chr(text[before]).isalnum() and text[before] < 0x80:
            return before
    return first

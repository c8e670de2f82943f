"""Questions that were asked before, word for word or nearly.

Two questions are near duplicates when their sets of three-word runs overlap by `NEAR` (Jaccard) or more. Candidates are found
by MinHash (Broder 1997): 32 minima in 8 bands of 4, of which two equal sets share all and two sets of overlap j share one
with probability 1 - (1 - j^4)^8, 0.83 at 0.7 and 0.996 at 0.85; the overlap itself is then computed, so that nothing is called
a duplicate that is none. What is remembered is bounded: the oldest questions are forgotten.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Literal

from megatron_spice.game.audit.words import words

NEAR = 0.7
_PRIME = (1 << 61) - 1
_BANDS, _ROWS = 8, 4
_MULTIPLIERS = [
    tuple(int.from_bytes(hashlib.blake2b(f"{part} {number}".encode(), digest_size=7).digest(), "big") | 1 for part in "ab")
    for number in range(_BANDS * _ROWS)
]
Kind = Literal["exact", "near"]


def shingles(question: str, size: int = 3) -> frozenset[str]:
    """The runs of `size` words; a shorter question is one run."""
    found = words(question)
    return frozenset(" ".join(found[start : start + size]) for start in range(max(1, len(found) - size + 1)))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard: what both have as a share of what either has."""
    return len(one & other) / len(one | other)


class Seen:
    """The last `size` different questions.

    Forgetting is by age of the first asking, so a question that is asked for ever is a duplicate again after each time that it
    was forgotten.
    """

    def __init__(self, size: int = 20_000) -> None:
        self._size = size
        self._questions: OrderedDict[str, tuple[frozenset[str], list[int]]] = OrderedDict()
        self._bands: dict[int, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._questions)

    def add(self, question: str) -> Kind | None:
        """What `question` is a duplicate of, if of anything; it is remembered from now on."""
        key = " ".join(words(question))
        if key in self._questions:
            return "exact"
        own = shingles(question)
        keys = _band_keys(own)
        candidates = {other for band in keys for other in self._bands.get(band, ())}
        is_near = any(overlap(own, self._questions[other][0]) >= NEAR for other in candidates)
        self._questions[key] = (own, keys)
        for band in keys:
            self._bands.setdefault(band, {})[key] = None
        if len(self._questions) > self._size:
            self._forget()
        return "near" if is_near else None

    def _forget(self) -> None:
        key, (_, keys) = self._questions.popitem(last=False)
        for band in keys:
            del self._bands[band][key]
            if not self._bands[band]:
                del self._bands[band]


def _band_keys(own: frozenset[str]) -> list[int]:
    """A number for each band, equal for two sets where the band's minima are."""
    hashes = [int.from_bytes(hashlib.blake2b(each.encode(), digest_size=7).digest(), "big") for each in own]
    minima = [min((factor * each + term) % _PRIME for each in hashes) for factor, term in _MULTIPLIERS]
    return [hash((band, *minima[band * _ROWS : (band + 1) * _ROWS])) for band in range(_BANDS)]

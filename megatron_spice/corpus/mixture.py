"""Passages drawn by source: which source by its weight, which of its passages uniformly.

Each draw takes two words of the counter-based generator at its position: one for the source, one for the place within it.
So a mixture is as stateless as the uniform order, and what it needs beside the passage table is the source table, which
lists passage numbers grouped by source. Weights are compared as exact fractions of 2**64: no rounding decides a draw.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

from megatron_spice.corpus.combine import open_sources
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.manifest import SOURCES_NAME

_WORDS = 1 << 64  # values of a word


class Mixture:
    """Shares of a corpus's sources.

    Args:
        corpus: whose `sources.npy` is drawn from.
        weights: by source label, above 0; they need not sum to 1. Sources that are not named are not drawn.

    Attributes:
        shares: the weights so scaled that they sum to 1.

    Raises:
        ValueError: a label or weight that cannot be meant, or a damaged source table.
    """

    def __init__(self, corpus: Corpus, weights: Mapping[str, float]):
        sources = corpus.manifest.sources
        _check(weights, {source["name"]: source["passages"] for source in sources})
        self._corpus = corpus
        self._numbers = open_sources(corpus.path / SOURCES_NAME)
        counts = [source["passages"] for source in sources]
        if len(self._numbers) != sum(counts):
            raise ValueError(_damaged(corpus))
        # In the order of the corpus, so that the order of the recipe's lines decides nothing.
        drawn = [number for number, source in enumerate(sources) if source["name"] in weights]
        exact = [Fraction(weights[sources[number]["name"]]) for number in drawn]
        firsts = [0, *accumulate(counts)]
        self._parts = [(firsts[number], counts[number], number) for number in drawn]
        self._upper = [math.floor(part * _WORDS / sum(exact)) for part in accumulate(exact)]
        self.shares = {sources[number]["name"]: float(part / sum(exact)) for number, part in zip(drawn, exact)}

    def index(self, place: int, choice: int) -> int:
        """The passage for two words: `choice` picks the source, `place` the passage in it.

        Raises:
            ValueError: the source table is damaged.
        """
        first, count, source = self._parts[bisect_right(self._upper, choice)]
        index = int(self._numbers[first + (place * count >> 64)])
        if index >= len(self._corpus) or self._corpus.source_id(index) != source:
            raise ValueError(_damaged(self._corpus))
        return index


def _check(weights: Mapping[str, float], passages: Mapping[str, int]) -> None:
    """That the weights are for this corpus; `passages` are counts by label."""
    there = ", ".join(f"{label} ({count:,} passages)" for label, count in passages.items())
    if not weights:
        raise ValueError(f"corpus.weights is empty; leave it out to draw uniformly, or give weights for: {there}")
    for label, weight in weights.items():
        if not passages.get(label):
            raise ValueError(f"corpus.weights names source {label}, of which the corpus has no passage; it has: {there}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"corpus.weights has {weight} for {label}; a weight is above 0, leave a source out to skip it")


def _damaged(corpus: Corpus) -> str:
    return f"corpus {corpus.path}: {SOURCES_NAME} does not match the passage table; make or copy the corpus again"

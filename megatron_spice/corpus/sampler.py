"""Which passages an iteration gets: independent draws, a pure function of seed and position.

Draw i is number i of a counter-based generator (Philox), so the whole state is one cursor: every rank that asks the
same gets the same, whatever the number of ranks, a resumed run goes on where it was, and a corpus of any size needs no
permutation in memory. Drawing with replacement is Algorithm 1's uniform sampling; `weights` draw by source instead
(mixture.py). The generator's raw 64-bit words are scaled here rather than by numpy, whose own scaling may change between
versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.random import Philox

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.mixture import Mixture
from megatron_spice.game.records import Passage

_STREAM = 0x5B1CE  # keeps these draws apart from other uses of the same seed


class PassageSampler:
    """Draws passages of `corpus`.

    Args:
        corpus: where from.
        seed: not negative; the order depends on it, the number of passages and the weights alone.
        weights: by source label (see `Mixture`); None draws uniformly from all passages.

    Raises:
        ValueError: the seed is negative, or the weights are not for this corpus.
    """

    def __init__(self, corpus: Corpus, seed: int, weights: Mapping[str, float] | None = None):
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; set train.seed to 0 or more")
        self._corpus = corpus
        self._seed = seed
        self._mixture = None if weights is None else Mixture(corpus, weights)
        self._cursor = 0

    def next(self, count: int) -> list[Passage]:
        """The next `count` passages."""
        return self._corpus.passages(self.next_indices(count))

    def next_indices(self, count: int) -> list[int]:
        """The next `count` passages as places in the corpus."""
        start, self._cursor = self._cursor, self._cursor + count
        return [self.index_at(position) for position in range(start, start + count)]

    def index_at(self, position: int) -> int:
        """Draw number `position` as a place in the corpus, wherever the cursor is."""
        if self._mixture is None:
            return draw(self._seed, position, len(self._corpus))
        return self._mixture.index(*_words(self._seed, position, 2))

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the cursor, and what it is only valid with."""
        return {
            "cursor": self._cursor,
            "seed": self._seed,
            "passages": len(self._corpus),
            "fingerprint": self._corpus.fingerprint,
            "weights": self._mixture and self._mixture.shares,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is of another seed, corpus or mixture, so the order could not be continued.
        """
        for key, value in self.state_dict().items():
            if key != "cursor" and state.get(key) != value:
                raise ValueError(
                    f"the checkpoint's corpus order has {key} {state.get(key)}, this run's has {value}; resume with the "
                    "recipe's own train.seed, corpus.path and corpus.weights, or start anew in another run.dir"
                )
        self._cursor = int(state["cursor"])


def draw(seed: int, position: int, size: int) -> int:
    """Draw number `position` of the stream of `seed`: uniform over range(size), up to size / 2**64."""
    return _words(seed, position, 1)[0] * size >> 64


def _words(seed: int, position: int, count: int) -> list[int]:
    """The first `count` (at most 4) of the 64-bit words that the stream has at a position."""
    return Philox(key=(_STREAM << 64) | (seed % 2**64), counter=position).random_raw(count).tolist()

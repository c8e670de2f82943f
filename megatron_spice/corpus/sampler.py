"""Which passages an iteration gets: uniform, independent, and a pure function of seed and position.

Draw i is number i of a counter-based generator (Philox), so the whole state is one cursor: every rank that asks the
same gets the same, whatever the number of ranks, a resumed run goes on where it was, and a corpus of any size needs no
permutation in memory. Drawing with replacement is Algorithm 1's uniform sampling. The generator's raw 64-bit words are
scaled here rather than by numpy, whose own scaling may change between versions.
"""

from __future__ import annotations

from numpy.random import Philox

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.game.records import Passage

_STREAM = 0x5B1CE  # keeps these draws apart from other uses of the same seed


class PassageSampler:
    """Draws passages of `corpus`; the order depends on `seed` (not negative) and the number of passages alone."""

    def __init__(self, corpus: Corpus, seed: int):
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; set train.seed to 0 or more")
        self._corpus = corpus
        self._seed = seed
        self._cursor = 0

    def next(self, count: int) -> list[Passage]:
        """The next `count` passages."""
        return [self._corpus.passage(index) for index in self.next_indices(count)]

    def next_indices(self, count: int) -> list[int]:
        """The next `count` passages as places in the corpus."""
        start, self._cursor = self._cursor, self._cursor + count
        return [draw(self._seed, position, len(self._corpus)) for position in range(start, start + count)]

    def state_dict(self) -> dict[str, int | str]:
        """Plain values: the cursor, and what it is only valid with."""
        return {
            "cursor": self._cursor,
            "seed": self._seed,
            "passages": len(self._corpus),
            "fingerprint": self._corpus.fingerprint,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is of another seed or another corpus, so the order could not be continued.
        """
        for key, value in self.state_dict().items():
            if key != "cursor" and state[key] != value:
                raise ValueError(
                    f"the checkpoint's corpus order has {key} {state[key]}, this run's has {value}; "
                    "resume with the recipe's own train.seed and corpus.path, or start anew in another run.dir"
                )
        self._cursor = int(state["cursor"])


def draw(seed: int, position: int, size: int) -> int:
    """Draw number `position` of the stream of `seed`: uniform over range(size), up to size / 2**64."""
    word = Philox(key=(_STREAM << 64) | (seed % 2**64), counter=position).random_raw()
    return int(word) * size >> 64

"""Where this rank is in an iteration, and whether it moves: what the watchdog looks at.

The driver says which phase it is in; work inside a phase that may take long says `moved()` whenever a part of it is done: a
micro-batch, a bucket of weights, a tensor loaded, a game ended, an engine seen at work. Both are an assignment, no clock and no
lock, so that they can stand in inner loops. A process has one place, hence one for the module.
"""

from __future__ import annotations


class Whereabouts:
    """`moves` grows with every sign of progress; `phase` is what the rank does, "start" until it iterates."""

    def __init__(self) -> None:
        self.phase = "start"
        self.moves = 0

    def enter(self, phase: str) -> None:
        """The rank is in another phase from here on."""
        self.phase = phase
        self.moves += 1


HERE = Whereabouts()


def moved() -> None:
    """This rank has made progress."""
    HERE.moves += 1

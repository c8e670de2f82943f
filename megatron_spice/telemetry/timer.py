"""Seconds of an iteration by phase, and what is left over.

The remainder is the point: time that belongs to no phase (`other`) is what a driver wastes between its phases, and it
should be seen, not assumed. A phase inside a phase is taken out of the outer one, so that the parts make up the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BETWEEN = "between phases"


class PhaseTimer:
    """Times phases from its making, or the last `restart`.

    `phase(name)` is a context manager; a name used again adds up. `clock` gives seconds and never goes back. `on_phase` is told
    the name of each phase that begins or is gone back to, BETWEEN outside of all.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, on_phase: Callable[[str], None] = lambda name: None):
        self._clock = clock
        self._on_phase = on_phase
        self._names: list[str] = []
        self._inner: list[float] = []  # seconds spent in phases inside each open phase
        self.restart()

    def restart(self) -> None:
        """Begin a new iteration."""
        assert not self._inner, "restart inside a phase"
        self._seconds: dict[str, float] = {}
        self._began = self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` as `name`, also when it ends by an exception."""
        began = self._clock()
        self._inner.append(0.0)
        self._names.append(name)
        self._on_phase(name)
        try:
            yield
        finally:
            elapsed = self._clock() - began
            own = elapsed - self._inner.pop()
            self._seconds[name] = self._seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed
            self._names.pop()
            self._on_phase(self._names[-1] if self._names else BETWEEN)

    def metrics(self) -> dict[str, float]:
        """`seconds/<phase>` in the order they began to be counted, `seconds/other` and `seconds/iteration`, so far."""
        total = self._clock() - self._began
        phases = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        return {**phases, "seconds/other": max(total - sum(self._seconds.values()), 0.0), "seconds/iteration": total}

"""The engines of one rank, of which some may have failed.

An engine that fails is killed at once and left alone until `revive`: the others of the crew go on meanwhile. Its
replacement is started only where the caller says so, because on an accelerator it takes its memory as it starts, and
the policy must not have it then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_spice.rollout.engine import Engine, EngineError


class Crew:
    """Engines that this rank hosts, usually one or none.

    Args:
        max_restarts: how often one engine may be replaced before `forgive`.
    """

    def __init__(self, engines: Sequence[Engine], max_restarts: int = 0) -> None:
        self.engines = list(engines)
        self.restarts = 0
        self._max_restarts = max_restarts
        self._failures: list[list[str]] = [[] for _ in self.engines]
        self._lost: set[int] = set()

    @property
    def working(self) -> list[Engine]:
        """Those that have not failed."""
        return [engine for place, engine in enumerate(self.engines) if place not in self._lost]

    @property
    def num_lost(self) -> int:
        return len(self._lost)

    def each(self, work: Callable[[Engine], object]) -> None:
        """Does something with every working engine; one that raises EngineError has failed."""
        for engine in self.working:
            try:
                work(engine)
            except EngineError as error:
                self.fail(engine, error)

    def fail(self, engine: Engine, error: EngineError) -> None:
        """Gives an engine up for lost and ends it."""
        place = self.engines.index(engine)
        if place not in self._lost:
            self._lost.add(place)
            self._failures[place].append(str(error))
            engine.kill()

    def last_words(self) -> list[str]:
        """Of each lost engine, the first line of how it failed."""
        return [self._failures[place][-1].partition("\n")[0] for place in sorted(self._lost)]

    def revive(self) -> None:
        """Starts a new engine for each lost one and waits for it; it has no weights, and all its memory.

        Raises:
            EngineError: one has failed more often than it may be replaced, or no new one comes up.
        """
        for place in sorted(self._lost):
            if len(self._failures[place]) > self._max_restarts:
                raise EngineError(self._given_up(place))
        for place in sorted(self._lost):
            self.engines[place].launch()
        for place in sorted(self._lost):
            self.restarts += 1
            try:
                self.engines[place].wait_ready()
            except EngineError as error:
                self._failures[place].append(str(error))
                self.engines[place].kill()
                continue
            self._lost.discard(place)
        if self._lost:
            self.revive()

    def forgive(self) -> None:
        """Forgets earlier failures: the run makes progress."""
        for place, failures in enumerate(self._failures):
            if place not in self._lost:
                failures.clear()

    def _given_up(self, place: int) -> str:
        failures = self._failures[place]
        *earlier, last = failures
        times = "once" if len(failures) == 1 else f"{len(failures)} times in a row"
        before = "".join(f"\nbefore that: {words.partition(chr(10))[0]}" for words in reversed(earlier))
        return f"an engine failed {times} (rollout.max_restarts={self._max_restarts}); the last time: {last}{before}"

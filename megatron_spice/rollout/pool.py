"""Spreads an iteration's passages over all engines and gives every rank all episodes.

Nobody assigns passages: each engine's host takes the next number from one counter in the store that all ranks share,
as soon as it has room. A passage that needs many attempts delays only its own host's next claim, so long tails balance
by themselves, and there is no scheduler process to keep alive. Each host plays `passages_in_flight` passages at a time
as coroutines of one event loop, which lives as long as the pool (so do the engines' connections).

Failure is collective: ranks exchange results *or* an error, and every rank raises. A host that failed says so in the
store, and the others claim nothing more. All waits end: a generation by its own timeout, the exchange by the group's.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megatron_spice.cluster.topology import Topology
from megatron_spice.game.records import Episode, Passage
from megatron_spice.rollout.engine import MEMORY, Engine, EngineError

Play = Callable[[Passage, int, int, Engine], Awaitable[Episode]]
"""Plays one passage: (passage, iteration, slot, engine) -> episode."""

SILENCE = 120.0
"""Seconds without a heartbeat of any engine host after which the others give up; hosts send two a second."""

T = TypeVar("T")


class Helper(Protocol):
    """Something that runs as long as the pool and wants its event loop: the verifier."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others about an iteration."""

    rank: int
    episodes: list[Episode]
    error: str | None = None


class RolloutPool:
    """All engines of a run, seen from one rank; every rank makes one and calls `play` with the same arguments.

    Args:
        store: shared by all ranks, with an atomic `add`.
        engines: those that this rank hosts, not yet launched; usually one or none.
        passages_in_flight: how many passages each engine plays at a time.
        helpers: started and closed with the pool where there are engines.
        group: a CPU process group of all ranks for the exchange; None: the default group.
    """

    def __init__(
        self,
        topology: Topology,
        store: dist.Store,
        engines: Sequence[Engine],
        play: Play,
        *,
        passages_in_flight: int,
        helpers: Sequence[Helper] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if passages_in_flight < 1:
            raise ValueError(f"rollout.passages_in_flight={passages_in_flight} must be 1 or more")
        self.engines = list(engines)
        self._topology = topology
        self._store = store
        self._play = play
        self._in_flight = passages_in_flight
        self._helpers = list(helpers) if engines else []
        self._group = group
        self._round = 0
        self._launched = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def launch(self) -> None:
        """Starts this rank's engines without waiting for them, so that they come up while the caller does other work."""
        for engine in self.engines:
            engine.launch()
        self._launched = True

    def start(self) -> None:
        """Starts what `launch` has not, and the helpers; returns on every rank when all ranks' engines are ready.

        Raises:
            EngineError: an engine of any rank did not come up.
        """
        self._collectively("starting the engines", self._start_mine)

    def _start_mine(self) -> None:
        if not self._launched:
            self.launch()
        if self._helpers:
            self._run(self._start_helpers())
        for engine in self.engines:
            engine.wait_ready()
        if self.engines:
            self._store.add("rollout/hosts", 1)

    async def _start_helpers(self) -> None:
        for helper in self._helpers:
            await helper.start()

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """Gives this rank's engines these kinds of memory back: "weights" before a sync, "kv_cache" after it."""
        for engine in self.engines:
            engine.wake(kinds)

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Waits until this rank's engines are idle and takes these kinds of memory from them."""
        for engine in self.engines:
            engine.sleep(kinds)

    def play(self, iteration: int, passages: Sequence[Passage]) -> list[Episode]:
        """Plays all passages once, on whichever engines have room; a collective of all ranks.

        Returns:
            One episode for each passage, in the order of `passages`, on every rank.

        Raises:
            EngineError: a passage could not be played on some rank; on every rank, with that rank's traceback.
        """
        self._round += 1
        key = f"rollout/{self._round}"
        report = _Report(self._topology.rank, [])
        if self.engines:
            try:
                report = _Report(self._topology.rank, self._run(self._play_mine(key, iteration, passages)))
            except Exception:
                self._store.add(f"{key}/failed", 1)
                report = _Report(self._topology.rank, [], traceback.format_exc())
        self._wait_for_hosts(key, f"the episodes of iteration {iteration}")
        reports = self._exchange(f"the episodes of iteration {iteration}", report)
        self._raise_errors(f"iteration {iteration}", reports)
        episodes = sorted((episode for each in reports for episode in each.episodes), key=lambda episode: episode.slot)
        if [episode.slot for episode in episodes] != list(range(len(passages))):
            played = [episode.slot for episode in episodes]
            raise EngineError(f"iteration {iteration}: {len(passages)} passages were to be played once each, not {played}")
        return episodes

    def close(self) -> None:
        """Ends this rank's engines and helpers; may be called twice and after a failure."""
        with ExitStack() as stack:  # whatever fails to close, the rest is closed
            if self._loop is not None:
                stack.callback(self._close_loop)
            for engine in self.engines:
                stack.callback(engine.close)
            if self._loop is not None:
                for each in (*(engine.close_requests for engine in self.engines), *(h.close for h in self._helpers)):
                    stack.callback(lambda close=each: self._run(close()))

    def _close_loop(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._loop = None

    # ---- this rank's share --------------------------------------------------------------------------------------

    async def _play_mine(self, key: str, iteration: int, passages: Sequence[Passage]) -> list[Episode]:
        episodes: list[Episode] = []

        async def player(engine: Engine) -> None:
            while (slot := self._claim(key)) < len(passages):
                episodes.append(await self._play(passages[slot], iteration, slot, engine))

        tasks = [asyncio.ensure_future(player(engine)) for engine in self.engines for _ in range(self._in_flight)]
        players = asyncio.gather(*tasks)
        watch = asyncio.ensure_future(self._watch(key))
        try:
            done, _ = await asyncio.wait([watch, players], return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()
        finally:
            # Not the gather: what is still running after a failure has to be over before the loop stops.
            for task in (*tasks, watch):
                task.cancel()
            await asyncio.gather(*tasks, players, watch, return_exceptions=True)
        return episodes

    def _wait_for_hosts(self, key: str, what: str) -> None:
        """Returns when every host has played its share, however long that takes, as long as they show signs of life.

        The exchange that follows is bounded by the group's timeout, which a long tail of passages may well exceed.
        """
        if self._topology.world_size == 1:
            return
        if self.engines:
            self._store.add(f"{key}/finished", 1)
        beats, heard = -1, time.monotonic()
        while self._store.add(f"{key}/finished", 0) < self._store.add("rollout/hosts", 0):
            if (now := self._store.add(f"{key}/beats", 0)) != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise EngineError(f"no engine host gave a sign of life for {SILENCE:.0f} s while waiting for {what}")
            time.sleep(0.05)

    def _claim(self, key: str) -> int:
        """The next slot; one past any batch once a rank has failed. The store answers within its own timeout."""
        if self._store.add(f"{key}/failed", 0):
            raise EngineError("another rank failed; its error says why")
        return self._store.add(f"{key}/claimed", 1) - 1

    async def _watch(self, key: str) -> None:
        """Notices a dead engine at once, even when nothing is being asked of it, and shows that this host lives."""
        while True:
            await asyncio.sleep(0.5)
            self._store.add(f"{key}/beats", 1)
            for engine in self.engines:
                engine.check()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(work)

    # ---- all ranks together -------------------------------------------------------------------------------------

    def _collectively(self, what: str, work: Callable[[], None]) -> None:
        error = None
        try:
            work()
        except Exception:
            error = traceback.format_exc()
        self._raise_errors(what, self._exchange(what, _Report(self._topology.rank, [], error)))

    def _exchange(self, what: str, report: _Report) -> list[_Report]:
        if self._topology.world_size == 1:
            return [report]
        reports: list[Any] = [None] * self._topology.world_size
        began = time.monotonic()
        try:
            dist.all_gather_object(reports, report, group=self._group)
        except RuntimeError as error:
            waited = time.monotonic() - began
            mine = f"; this rank itself failed:\n{report.error}" if report.error else ""
            raise EngineError(f"waited {waited:.0f} s for other ranks ({what}): {error}{mine}") from error
        return reports

    def _raise_errors(self, what: str, reports: Sequence[_Report]) -> None:
        errors = [f"rank {each.rank}:\n{each.error}" for each in reports if each.error is not None]
        if errors:
            raise EngineError(f"{what} failed on {len(errors)} of {len(reports)} ranks\n" + "\n".join(errors))

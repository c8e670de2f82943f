"""Spreads an iteration's passages over all engines and gives every rank all episodes, the first rank whole ones.

Nobody assigns passages: each engine's host takes the next number from one counter in the store that all ranks share,
as soon as it has room. A passage that needs many attempts delays only its own host's next claim, so long tails balance
by themselves, and there is no scheduler process to keep alive. Each host plays `passages_in_flight` passages at a time
as coroutines of one event loop, which lives as long as the pool (so do the engines' connections).

An engine that fails takes its passages with it, and nothing else: they are missing from what `play` returns, the other
engines go on, and `revive` replaces it. `train.py` then plays what is missing. Any other error is collective: ranks
exchange results *or* an error, and every rank raises. A host that failed says so in the store, and the others claim
nothing more. All waits end: a generation by its own timeout, the exchange by the group's.

Where more games are begun than wanted (`rollout.oversample`), each that ends takes a number from a second counter. Once
that has reached the number wanted, hosts claim nothing more and cut short what their engines generate; games that are not
over then, or ended a moment too late, are put off with their journals, and every rank gets those too.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megatron_spice.cluster.interruption import Interrupted
from megatron_spice.cluster.topology import Topology
from megatron_spice.cluster.whereabouts import moved
from megatron_spice.game.carried import Game
from megatron_spice.game.episodes import trained_part
from megatron_spice.game.journal import Decode, Recorder
from megatron_spice.game.records import Episode, Generator, Passage
from megatron_spice.game.together import GamePutOff
from megatron_spice.rollout.crew import Crew
from megatron_spice.rollout.engine import MEMORY, Engine, EngineError, EnginesLost

Play = Callable[[Passage, int, int, Generator], Awaitable[Episode]]
"""Plays one passage: (passage, iteration in which it was begun, slot, engine) -> episode."""

SILENCE = 120.0
"""Seconds without a heartbeat of any engine host after which the others give up; hosts send two a second."""

LOOK = timedelta(seconds=1)
"""Between two looks for signs of life."""

T = TypeVar("T")


class Helper(Protocol):
    """Something that runs as long as the pool and wants its event loop: the verifier."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Played:
    """What came of a batch of games, the same games on every rank.

    `episodes` are those that count, `left` the games that are still to be played, both in the order of the batch;
    `num_aborted` is how many completions were cut short. Only the first rank has all of an episode, the others what training
    needs (`trained_part`): texts and all that is only logged would cost each rank time that grows with the number of ranks.
    """

    episodes: list[Episode]
    left: list[Game]
    num_aborted: int = 0


@dataclass
class _Share:
    """What one rank has done of a batch, by place in it."""

    episodes: dict[int, Episode] = field(default_factory=dict)
    put_off: dict[int, Game] = field(default_factory=dict)
    num_aborted: int = 0

    def trained_part(self) -> _Share:
        """What all ranks need of it."""
        return replace(self, episodes={place: trained_part(episode) for place, episode in self.episodes.items()})


@dataclass
class _Round:
    """A batch of games while it is played: `enough` of them are to end."""

    key: str
    iteration: int
    games: Sequence[Game]
    enough: int
    share: _Share = field(default_factory=_Share)
    is_over: bool = False


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others about an iteration."""

    rank: int
    share: _Share = field(default_factory=_Share)
    error: str | None = None
    lost: tuple[str, ...] = ()
    restarts: int = 0
    interrupted: bool = False


class RolloutPool:
    """All engines of a run, seen from one rank; every rank makes one and calls `play` with the same arguments.

    Args:
        store: shared by all ranks, with an atomic `add`.
        engines: those that this rank hosts, not yet launched; usually one or none.
        passages_in_flight: how many passages each engine plays at a time.
        decode: text of token ids; needed where games are put off.
        max_restarts: how often one engine may be replaced in an iteration.
        start_timeout: seconds that engines of other ranks may take to come up before waiting for them counts as a hang.
        helpers: started and closed with the pool where there are engines.
        is_interrupted: whether games are to be given up; asked some times a second while they are played.
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
        decode: Decode = lambda ids: "",
        max_restarts: int = 0,
        start_timeout: float = 300.0,
        helpers: Sequence[Helper] = (),
        is_interrupted: Callable[[], bool] = lambda: False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if passages_in_flight < 1:
            raise ValueError(f"rollout.passages_in_flight={passages_in_flight} must be 1 or more")
        self.crew = Crew(engines, max_restarts)
        self._topology = topology
        self._store = store
        self._play = play
        self._in_flight = passages_in_flight
        self._decode = decode
        self._helpers = list(helpers) if engines else []
        self._is_interrupted = is_interrupted
        self._group = group
        self._start_timeout = start_timeout
        self._round = self._iteration = 0
        self._launched = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def launch(self) -> None:
        """Starts this rank's engines without waiting for them, so that they come up while the caller does other work."""
        for engine in self.crew.engines:
            engine.launch()
        self._launched = True

    def start(self) -> None:
        """Starts what `launch` has not, and the helpers; returns on every rank when all ranks' engines are ready.

        Raises:
            EngineError: an engine of any rank did not come up.
        """
        self._collectively("starting the engines", self._start_mine, self._wait_for_starts)

    def _wait_for_starts(self) -> None:
        """Returns when every rank's engines are up or have failed, or `start_timeout` has passed: a collective would wait no
        longer than the group's timeout, which may be less."""
        size = self._topology.world_size
        number = self._store.add("rollout/started", 1)
        everyone = f"rollout/all_started/{-(-number // size)}"
        if number % size == 0:
            self._store.set(everyone, "")
        began = time.monotonic()
        while not self._comes(everyone) and time.monotonic() - began < self._start_timeout:
            self._store.add("rollout/started", 0)  # raises when the store is gone
            moved()

    def _start_mine(self) -> None:
        if not self._launched:
            self.launch()
        if self._helpers:
            self._run(self._start_helpers())
        for engine in self.crew.engines:
            engine.wait_ready()
        if self.crew.engines:
            self._store.add("rollout/hosts", 1)

    async def _start_helpers(self) -> None:
        for helper in self._helpers:
            await helper.start()

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """Gives this rank's engines these kinds of memory back: "weights" before a sync, "kv_cache" after it."""
        self.crew.each(lambda engine: engine.wake(kinds))

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Waits until this rank's engines are idle and takes these kinds of memory from them."""
        self.crew.each(lambda engine: engine.sleep(kinds))

    def lost(self) -> list[str]:
        """How engines of any rank have failed that are not replaced yet, one line each; a collective of all ranks."""
        self.crew.each(lambda engine: engine.check())
        report = _Report(self._topology.rank, lost=tuple(self.crew.last_words()))
        reports = self._exchange("looking for lost engines", report)
        return [f"engine of rank {each.rank}: {words}" for each in reports for words in each.lost]

    def revive(self) -> int:
        """Replaces lost engines; a collective of all ranks. A new engine has no weights, and all its memory.

        Returns:
            How many engines all ranks have replaced so far.

        Raises:
            EnginesLost: one has failed too often, or cannot be started; on every rank, which are otherwise well.
        """
        error = None
        try:
            if self._loop is not None:
                for engine in self.crew.engines:
                    self._run(engine.close_requests())
            self.crew.revive()
        except EngineError as found:
            error = str(found)
        self._wait_for_starts()
        report = _Report(self._topology.rank, error=error, restarts=self.crew.restarts)
        reports = self._exchange("replacing lost engines", report)
        if errors := [f"rank {each.rank}: {each.error}" for each in reports if each.error is not None]:
            raise EnginesLost("\n".join(errors))
        return sum(each.restarts for each in reports)

    def play(self, iteration: int, games: Sequence[Game], enough: int | None = None) -> Played:
        """Plays games on whichever engines have room; a collective of all ranks.

        Args:
            enough: the iteration is over when so many games have ended; None: all.

        Raises:
            EngineError: a game could not be played for another reason than its engine's failure; on every rank, with that
                rank's traceback.
            Interrupted: the games were to be given up; on every rank.
        """
        if iteration != self._iteration:
            self._iteration = iteration
            self.crew.forgive()
        self._round += 1
        turn = _Round(f"rollout/{self._round}", iteration, games, len(games) if enough is None else enough)
        report = _Report(self._topology.rank, turn.share)
        if self.crew.engines:
            try:
                self._run(self._play_mine(turn))
            except Interrupted:
                report = _Report(self._topology.rank, interrupted=True)
            except Exception:
                self._store.add(f"{turn.key}/failed", 1)
                report = _Report(self._topology.rank, error=traceback.format_exc())
        what = f"the episodes of iteration {iteration}"
        self._wait_for_hosts(turn.key, what)
        reports = self._exchange(what, replace(report, share=report.share.trained_part()))
        if any(each.interrupted for each in reports):
            raise Interrupted
        self._raise_errors(f"iteration {iteration}", reports)
        return _merged(turn, self._whole_on_first(turn.share, [each.share for each in reports]))

    def kill(self) -> None:
        """Ends this rank's engines at once: what they are doing is of no use any more. `close` follows for the rest."""
        for engine in self.crew.engines:
            engine.kill()

    def close(self) -> None:
        """Ends this rank's engines and helpers; may be called twice and after a failure."""
        with ExitStack() as stack:  # whatever fails to close, the rest is closed
            if self._loop is not None:
                stack.callback(self._close_loop)
            for engine in self.crew.engines:
                stack.callback(engine.close)
            if self._loop is not None:
                for each in (*(engine.close_requests for engine in self.crew.engines), *(h.close for h in self._helpers)):
                    stack.callback(lambda close=each: self._run(close()))

    def _close_loop(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._loop = None

    # ---- this rank's share --------------------------------------------------------------------------------------

    async def _play_mine(self, turn: _Round) -> None:
        async def player(engine: Engine) -> None:
            while (place := self._claim(turn)) < len(turn.games):
                await self._play_one(turn, place, engine)

        async def serve(engine: Engine) -> None:
            watches = [self._watch(engine)]
            if turn.enough < len(turn.games):
                watches.append(self._cut_short(turn, engine))
            try:
                await _until_first(watches, [player(engine) for _ in range(self._in_flight)])
            except EngineError as error:
                self.crew.fail(engine, error)

        watches = [self._beat(turn.key), self._heed_interruption()]
        await _until_first(watches, [serve(engine) for engine in self.crew.working])

    async def _play_one(self, turn: _Round, place: int, engine: Engine) -> None:
        game, share, began = turn.games[place], turn.share, time.monotonic()
        recorder = Recorder(engine, game.said, self._decode, lambda: turn.is_over)
        try:
            episode = await self._play(game.passage, game.begun, game.slot, recorder)
        except GamePutOff:
            if not turn.is_over:
                raise RuntimeError("the engine aborted a request that nobody wanted aborted") from None
            episode = None
        moved()
        share.num_aborted += recorder.num_aborted
        seconds = game.seconds + time.monotonic() - began
        ended = 0
        if episode is not None:
            ended = self._store.add(f"{turn.key}/ended", 1)
            turn.is_over |= ended >= turn.enough
        if 0 < ended <= turn.enough:
            share.episodes[place] = replace(episode, iteration=turn.iteration, begun=game.begun, seconds=seconds)
        else:
            share.put_off[place] = replace(game, said=recorder.said, seconds=seconds)

    async def _cut_short(self, turn: _Round, engine: Engine) -> None:
        """When enough games have ended, on whichever rank, ends what the engine generates; more than once, because a request
        may be on its way."""
        while True:
            await asyncio.sleep(0.05)
            turn.is_over = turn.is_over or self._store.add(f"{turn.key}/ended", 0) >= turn.enough
            if turn.is_over:
                sent = asyncio.ensure_future(engine.abort())
                try:
                    await asyncio.shield(sent)
                except asyncio.CancelledError:
                    # All requests have ended meanwhile. One that is asked next must not be hit by what is still on its way.
                    await asyncio.wait([sent], timeout=5.0)
                    raise

    def _wait_for_hosts(self, key: str, what: str) -> None:
        """Returns when every host has played its share, however long that takes, as long as they show signs of life.

        The exchange that follows is bounded by the group's timeout, which a long tail of passages may well exceed.
        """
        if self._topology.world_size == 1:
            return
        if self.crew.engines and self._store.add(f"{key}/finished", 1) >= self._store.add("rollout/hosts", 0):
            self._store.set(f"{key}/over", "")
        beats, heard = -1, time.monotonic()
        while not self._comes(f"{key}/over"):
            if (now := self._store.add(f"{key}/beats", 0)) != beats:
                beats, heard = now, time.monotonic()
                moved()
            elif time.monotonic() - heard > SILENCE:
                raise EngineError(f"no engine host gave a sign of life for {SILENCE:.0f} s while waiting for {what}")
            self._is_interrupted()  # the hosts hear of it from this rank if nobody else was told

    def _comes(self, key: str) -> bool:
        """Whether the store has a key within a second. The store sends word when it does: thousands of ranks that asked it again
        and again would be its only work."""
        try:
            self._store.wait([key], LOOK)
        except RuntimeError:  # not yet; a store that is gone is found by the next question
            return False
        return True

    def _claim(self, turn: _Round) -> int:
        """The place of the next game; one past the batch when the iteration is over. The store answers within its own timeout."""
        if self._store.add(f"{turn.key}/failed", 0):
            raise RuntimeError("another rank failed; its error says why")
        return len(turn.games) if turn.is_over else self._store.add(f"{turn.key}/claimed", 1) - 1

    async def _beat(self, key: str) -> None:
        """Shows the other ranks that this host lives."""
        while True:
            await asyncio.sleep(0.5)
            self._store.add(f"{key}/beats", 1)

    async def _heed_interruption(self) -> None:
        while not self._is_interrupted():
            await asyncio.sleep(0.5)
        raise Interrupted

    async def _watch(self, engine: Engine) -> None:
        """Notices a dead engine at once, even when nothing is being asked of it."""
        while True:
            await asyncio.sleep(0.5)
            engine.check()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(work)

    # ---- all ranks together -------------------------------------------------------------------------------------

    def _collectively(self, what: str, work: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        error = None
        try:
            work()
        except Exception:
            error = traceback.format_exc()
        then()
        self._raise_errors(what, self._exchange(what, _Report(self._topology.rank, error=error)))

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

    def _whole_on_first(self, mine: _Share, shares: list[_Share]) -> list[_Share]:
        """All ranks' shares, with whole episodes on the first rank, which logs them: each rank that has some sends its own, and
        nobody else sends or receives anything."""
        if self._topology.world_size == 1:
            return [mine]
        if not self._topology.is_first:
            if mine.episodes:
                dist.send_object_list([mine.episodes], dst=0, group=self._group)
            return shares
        whole = [mine, *shares[1:]]
        for rank, share in enumerate(shares[1:], 1):
            if share.episodes:
                received: list[Any] = [None]
                dist.recv_object_list(received, src=rank, group=self._group)
                whole[rank] = replace(share, episodes=received[0])
        return whole

    def _raise_errors(self, what: str, reports: Sequence[_Report]) -> None:
        errors = [f"rank {each.rank}:\n{each.error}" for each in reports if each.error is not None]
        if errors:
            raise EngineError(f"{what} failed on {len(errors)} of {len(reports)} ranks\n" + "\n".join(errors))


def _merged(turn: _Round, shares: Sequence[_Share]) -> Played:
    """All ranks' shares of a batch; a game that nobody has played, or its engine has lost, is left as it was."""
    played = [place for share in shares for place in share.episodes]
    if len(set(played)) != len(played) or len(played) > turn.enough:
        raise EngineError(f"iteration {turn.iteration}: {turn.enough} games were to be played once, not {sorted(played)}")
    episodes = {place: episode for share in shares for place, episode in share.episodes.items()}
    put_off = {place: game for share in shares for place, game in share.put_off.items()}
    left = [put_off.get(place, game) for place, game in enumerate(turn.games) if place not in episodes]
    return Played([episodes[place] for place in sorted(episodes)], left, sum(share.num_aborted for share in shares))


async def _until_first(watches: Sequence[Coroutine[Any, Any, None]], work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all until the work is done or something fails, which is then raised; whatever still runs is over by then."""
    tasks = [asyncio.ensure_future(each) for each in (*watches, *work)]
    done = asyncio.gather(*tasks[len(watches) :])
    try:
        finished, _ = await asyncio.wait([*tasks[: len(watches)], done], return_when=asyncio.FIRST_COMPLETED)
        for each in finished:
            each.result()
    finally:
        # Not the gather: cancelling it would not wait for what it gathers.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, done, return_exceptions=True)

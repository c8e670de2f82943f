"""The pool with engines that need no server: two ranks of gloo, each a process, each host of one."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_spice.cluster.interruption import Interrupted
from megatron_spice.cluster.topology import Topology
from megatron_spice.game.carried import Game, new_games
from megatron_spice.game.records import Attempt, Completion, Episode, Passage, Sampling
from megatron_spice.rollout.engine import EngineError, EnginesLost
from megatron_spice.rollout.pool import RolloutPool


class FakeEngine:
    """Answers after a moment; notes how many requests it had at a time."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.running, self.most, self.life = delay, 0, 0, []
        self.dead = False

    def launch(self) -> None:
        self.life.append("launch")

    def wait_ready(self) -> None:
        self.life.append("ready")

    def close(self) -> None:
        self.life.append("close")

    def kill(self) -> None:
        self.life.append("kill")

    def check(self) -> None:
        if self.dead:
            raise EngineError("the engine has ended")

    def sleep(self, kinds: Any) -> None:
        self.life.append(("sleep", tuple(kinds)))

    def wake(self, kinds: Any) -> None:
        self.life.append(("wake", tuple(kinds)))

    async def close_requests(self) -> None:
        self.life.append("close_requests")

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.delay * random.random())
        self.running -= 1
        return [Completion(tuple(prompt_ids), (1,), (0.0,), "stop", "x")] * num_samples


async def play(passage: Passage, iteration: int, slot: int, engine: FakeEngine) -> Episode:
    if passage.text == "bad":
        raise ValueError("a passage that cannot be played")
    [completion] = await engine.generate(list(passage.token_ids), 1, Sampling(1.0, 1))
    return Episode(iteration, slot, passage, "chat", "MCQ", (Attempt(completion, None, None),))


def games(count: int, iteration: int = 1) -> list[Game]:
    return new_games(iteration, [Passage(100 + index, 0, "test", (index,), "") for index in range(count)])


def single(engine: FakeEngine, **settings: Any) -> RolloutPool:
    return RolloutPool(Topology(), dist.HashStore(), [engine], play, **({"passages_in_flight": 3} | settings))


def test_one_rank_plays_all_in_order_and_no_more_at_a_time_than_it_may() -> None:
    engine = FakeEngine(delay=0.01)
    pool = single(engine)
    pool.start()
    for iteration in (1, 2):  # the second on the same loop
        episodes = pool.play(iteration, games(20, iteration)).episodes
        assert [(e.iteration, e.slot, e.passage.index) for e in episodes] == [(iteration, i, 100 + i) for i in range(20)]
    assert engine.most == 3 and pool.play(3, []).episodes == []
    pool.sleep()
    pool.wake(["weights"])
    pool.close()
    pool.close()
    assert engine.life[:4] == ["launch", "ready", ("sleep", ("weights", "kv_cache")), ("wake", ("weights",))]
    assert engine.life.count("close_requests") == 1


def test_a_passage_that_fails_is_an_error_and_the_pool_can_go_on() -> None:
    pool = single(FakeEngine(delay=0.01))
    bad = Game(4, 5, Passage(0, 0, "test", (1,), "bad"))
    with pytest.raises(EngineError, match="(?s)iteration 4 failed on 1 of 1 ranks.*cannot be played"):
        pool.play(4, [*games(5), bad, *games(5)])
    assert len(pool.play(5, games(4)).episodes) == 4
    pool.close()


def test_an_engine_that_dies_silently_is_noticed_and_loses_only_what_it_was_playing() -> None:
    engine = FakeEngine(delay=1000.0)
    engine.dead = True
    pool = single(engine, max_restarts=1)
    assert pool.play(1, games(2)).left == games(2) and engine.life == ["kill"]
    assert pool.lost() == ["engine of rank 0: the engine has ended"]
    assert pool.play(1, games(2)).episodes == []  # nothing is asked of a dead engine
    pool.sleep()
    engine.delay, engine.dead = 0.0, False
    assert pool.revive() == 1 and pool.lost() == []
    assert engine.life == ["kill", "close_requests", "launch", "ready"]
    assert [episode.slot for episode in pool.play(1, [games(6)[slot] for slot in (1, 4, 5)]).episodes] == [1, 4, 5]
    pool.close()


def test_an_engine_that_keeps_failing_is_given_up_within_an_iteration_and_not_over_many() -> None:
    engine = FakeEngine()
    pool = single(engine, max_restarts=2)
    for iteration in range(1, 5):
        for failure in range(3 if iteration == 4 else 2):
            engine.dead, engine.delay = True, 1000.0
            assert pool.play(iteration, games(1)).episodes == [] and len(pool.lost()) == 1
            if failure == 2:
                with pytest.raises(EnginesLost, match="(?s)failed 3 times in a row .rollout.max_restarts=2.*has ended"):
                    pool.revive()
                return pool.close()
            engine.dead, engine.delay = False, 0.0
            pool.revive()
        assert len(pool.play(iteration, games(3)).episodes) == 3
    raise AssertionError("it was never given up")


def test_an_engine_that_answers_garbage_is_replaced_and_nothing_of_it_is_kept() -> None:
    class Garbage(FakeEngine):
        async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
            if prompt_ids == [3] and "launch" not in self.life:
                raise EngineError("no completion")
            return await super().generate(prompt_ids, num_samples, sampling)

    engine = Garbage(delay=0.01)
    pool = single(engine, max_restarts=1)
    first = pool.play(1, games(8))
    missing = [game.slot for game in first.left]
    assert 3 in missing and len(pool.lost()) == 1
    assert sorted([*missing, *(episode.slot for episode in first.episodes)]) == list(range(8))
    pool.revive()
    again = pool.play(1, first.left)
    assert [episode.slot for episode in again.episodes] == missing and again.left == []
    pool.close()


def test_helpers_run_where_engines_are() -> None:
    class Counter:
        started = closed = 0

        async def start(self) -> None:
            self.started += 1

        async def close(self) -> None:
            self.closed += 1

    helper, idle = Counter(), Counter()
    pool = single(FakeEngine(), helpers=[helper])
    pool.start()
    pool.close()
    RolloutPool(Topology(), dist.HashStore(), [], play, passages_in_flight=1, helpers=[idle]).start()
    assert (helper.started, helper.closed, idle.started) == (1, 1, 0)


def on_two_ranks(rank: int, store_path: str, folder: str, work: Callable[[int, dist.Store], None]) -> None:
    store = dist.FileStore(store_path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    try:
        work(rank, dist.PrefixStore("test", store))
    except BaseException:
        (Path(folder) / f"rank{rank}.txt").write_text(traceback.format_exc())
    finally:
        dist.destroy_process_group()


def two_ranks(rank: int, store: dist.Store) -> None:
    topology = Topology(rank=rank, world_size=2, local_rank=rank, local_world_size=2)

    def pool(*engines: FakeEngine) -> RolloutPool:
        made = RolloutPool(topology, store, engines, play, passages_in_flight=2)
        made.start()
        return made

    # A slow engine and a fast one: all passages once, most of them by the fast one.
    both = pool(FakeEngine(delay=0.2 if rank == 0 else 0.0))
    episodes = both.play(1, games(30)).episodes
    assert [episode.slot for episode in episodes] == list(range(30))
    # A failure on one rank is an error on both, and neither waits.
    with pytest.raises(EngineError, match="(?s)iteration 2 failed.*cannot be played"):
        both.play(2, [Game(2, 0, Passage(0, 0, "test", (1,), "bad")), *games(30)])
    assert len(both.play(3, games(3)).episodes) == 3
    both.close()

    # An engine that fails: the other rank's plays on, both know what is missing, and what is missing is played again.
    lame = FakeEngine(delay=1000.0 if rank == 1 else 0.02)
    lame.dead = rank == 1
    store = dist.PrefixStore("lame", store)
    pair = RolloutPool(topology, store, [lame], play, passages_in_flight=2, max_restarts=1)
    pair.start()
    first = pair.play(1, games(40))
    played = [episode.slot for episode in first.episodes]
    assert 30 < len(played) < 40 and pair.lost() == ["engine of rank 1: the engine has ended"]
    lame.dead, lame.delay = False, 0.0
    assert pair.revive() == 1
    again = pair.play(1, first.left).episodes
    assert sorted(played + [episode.slot for episode in again]) == list(range(40))
    pair.close()

    # Only the first rank hosts an engine; the other gets the episodes all the same.
    store = dist.PrefixStore("one", store)
    one = RolloutPool(topology, store, [FakeEngine()] if rank == 0 else [], play, passages_in_flight=2)
    assert [episode.passage.index for episode in one.play(1, games(7)).episodes] == list(range(100, 107))
    one.close()

    # An engine that does not come up stops both ranks.
    class Broken(FakeEngine):
        def wait_ready(self) -> None:
            raise EngineError("no model there")

    with pytest.raises(EngineError, match="(?s)starting the engines failed on 1 of 2 ranks.*rank 1.*no model there"):
        pool(Broken() if rank == 1 else FakeEngine())


def test_two_ranks_share_the_passages_and_the_failures(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path), two_ranks)
    multiprocessing.spawn(on_two_ranks, args=arguments, nprocs=2)
    assert not list(tmp_path.glob("rank*.txt")), "\n".join(path.read_text() for path in tmp_path.glob("rank*.txt"))


def test_a_store_that_is_gone_ends_the_wait_for_other_ranks_engines() -> None:
    server = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    store = dist.TCPStore("127.0.0.1", server[0].port, is_master=False)
    pool = RolloutPool(Topology(world_size=2, local_world_size=2), store, [FakeEngine()], play, passages_in_flight=1, start_timeout=20)
    began = time.monotonic()
    threading.Timer(0.3, server.clear).start()
    with pytest.raises(dist.DistError):
        pool.start()
    assert time.monotonic() - began < 10


def test_games_are_given_up_when_the_job_is_to_end() -> None:
    engine, asked = FakeEngine(delay=30.0), []

    def is_interrupted() -> bool:
        asked.append(engine.running)
        return len(asked) == 2

    pool = single(engine, is_interrupted=is_interrupted)
    pool.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        pool.play(1, games(5))
    pool.close()
    assert time.monotonic() - began < 5 and asked == [0, 3] or asked == [3, 3]

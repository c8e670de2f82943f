"""More games begun than wanted: the others go on in the next iteration, on engines of a few lines and on a real server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from dice_engine import DiceEngine, decode

from megatron_spice.cluster.topology import Topology
from megatron_spice.game.carried import Game, game_from_state, game_state, new_games
from megatron_spice.game.episodes import trained_part
from megatron_spice.game.journal import Entry, Recorder
from megatron_spice.game.records import Attempt, Completion, Episode, Generator, Passage, Sampling
from megatron_spice.rollout.engine import EngineError
from megatron_spice.rollout.pool import Played, RolloutPool
from megatron_spice.rollout.supervisor import SglangEngine
from tests.rollout.test_pool import on_two_ranks

WANTED, BATCH, ITERATIONS = 4, 7, 6


class Hosted(DiceEngine):
    """An engine that a pool can host, as slow as its rank says; `breaks_after` so many requests it fails once."""

    def __init__(self, delay: float = 0.01, breaks_after: int | None = None) -> None:
        super().__init__()
        self.delay = delay
        self.breaks_after = breaks_after

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        if self.breaks_after == self.num_requests:
            self.breaks_after = None
            raise EngineError("it answers garbage")
        return await super().generate(prompt_ids, num_samples, sampling)

    async def _one(self, *request: Any) -> Completion:
        running, aborts = asyncio.ensure_future(super()._one(*request)), self._aborts
        await asyncio.sleep(self.delay * min(20.0, random.expovariate(1.0) ** 2))
        if self._aborts > aborts:  # the abort came while it waited
            whole = await running
            kept = random.randrange(max(1, len(whole.completion_ids)))
            ids, logprobs = whole.completion_ids[:kept], whole.logprobs[:kept]
            return replace(whole, completion_ids=ids, logprobs=logprobs, finish="abort", text="")
        return await running

    def launch(self) -> None: ...

    def wait_ready(self) -> None: ...

    def check(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...

    async def close_requests(self) -> None: ...


async def play(passage: Passage, iteration: int, slot: int, engine: Generator) -> Episode:
    """Requests one after the other and one beside the other, more or fewer by slot."""
    attempts: list[Attempt] = []
    for turn in range(1 + (7 * iteration + slot) % 3):
        seeds = random.Random(f"{iteration} {slot} {turn}")
        requests = [Sampling(1.0, 6, stop=("\n\n",), seed=seeds.getrandbits(31)) for _ in range(2)]
        for found in await asyncio.gather(*(engine.generate(list(passage.token_ids), 2, each) for each in requests)):
            attempts += [Attempt(completion, None, None) for completion in found]
    return Episode(iteration, slot, passage, "chat", "MCQ", tuple(attempts))


def passage(index: int) -> Passage:
    return Passage(index, 0, "test", (index % 50 + 40, 41), "")


def said(episode: Episode) -> list[tuple]:
    whole = [attempt.completion for attempt in episode.attempts]
    return [(each.completion_ids, each.logprobs, each.finish, each.text) for each in whole]


def iterate(pool: RolloutPool, iterations: int = ITERATIONS) -> list[Played]:
    """What `train._play` does; between iterations the games go through a checkpoint."""
    carried: list[Game] = []
    drawn, found = 0, []
    for iteration in range(1, iterations + 1):
        missing = BATCH - len(carried)
        games = carried + new_games(iteration, [passage(index) for index in range(drawn, drawn + missing)])
        drawn += missing
        played = pool.play(iteration, games, WANTED)
        while len(played.episodes) < WANTED:
            assert pool.lost()
            pool.revive()
            more = pool.play(iteration, played.left, WANTED - len(played.episodes))
            played = Played(played.episodes + more.episodes, more.left)
        assert all(episode.iteration == iteration for episode in played.episodes)
        begun = [(game.begun, game.slot) for game in games]
        assert [(game.begun, game.slot) for game in played.left] == [
            place for place in begun if place not in {(episode.begun, episode.slot) for episode in played.episodes}
        ], "no game is lost, and their order is kept"
        carried = [game_from_state(json.loads(json.dumps(game_state(game))), passage) for game in played.left]
        assert carried == played.left
        found.append(played)
    return found


def check_laws(rounds: Sequence[Played]) -> None:
    """Every passage ends once or is left; and what was said is what an engine that is never cut short says."""
    episodes = [episode for played in rounds for episode in played.episodes]
    assert [len(played.episodes) for played in rounds] == [WANTED] * len(rounds)
    indices = [episode.passage.index for episode in episodes] + [game.passage.index for game in rounds[-1].left]
    assert sorted(indices) == list(range(WANTED * (len(rounds) - 1) + BATCH))
    for episode in episodes:
        assert episode.begun is not None and episode.begun <= episode.iteration
        alone = asyncio.run(play(episode.passage, episode.begun, episode.slot, DiceEngine()))
        assert said(episode) == said(alone)


@pytest.mark.parametrize("breaks_after", [None, 5, 30])
def test_over_iterations_no_game_is_lost_or_counted_twice(breaks_after: int | None) -> None:
    engine = Hosted(breaks_after=breaks_after)
    pool = RolloutPool(
        Topology(), dist.HashStore(), [engine], play, passages_in_flight=5, decode=decode, max_restarts=1
    )  # fmt: skip
    pool.start()
    rounds = iterate(pool)
    pool.close()
    check_laws(rounds)
    assert sum(played.num_aborted for played in rounds) > 0
    assert any(episode.begun < episode.iteration for played in rounds for episode in played.episodes)


def two_ranks(rank: int, store: dist.Store) -> None:
    topology = Topology(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    engine = Hosted(delay=0.01 if rank else 0.03, breaks_after=12 if rank else None)
    pool = RolloutPool(topology, store, [engine], play, passages_in_flight=3, decode=decode, max_restarts=1)
    pool.start()
    rounds = iterate(pool, 4)
    if rank == 0:  # the other gets of an episode what it trains on
        check_laws(rounds)
    seen: list[Any] = [None, None]
    trained = [([trained_part(episode) for episode in played.episodes], played.left) for played in rounds]
    dist.all_gather_object(seen, trained)
    assert seen[0] == seen[1], "ranks disagree"
    pool.close()


def test_two_ranks_agree_on_what_counts_and_what_is_carried_over(tmp_path: Path) -> None:
    multiprocessing.spawn(on_two_ranks, args=(str(tmp_path / "store"), str(tmp_path), two_ranks), nprocs=2)
    assert not list(tmp_path.glob("rank*.txt")), "\n".join(path.read_text() for path in tmp_path.glob("rank*.txt"))


def test_an_abort_that_nobody_wanted_is_an_error() -> None:
    class Moody(Hosted):
        async def _one(self, *request: Any) -> Completion:
            return replace(await super()._one(*request), finish="abort")

    pool = RolloutPool(Topology(), dist.HashStore(), [Moody()], play, passages_in_flight=1, decode=decode)
    with pytest.raises(EngineError, match="nobody wanted aborted"):
        pool.play(1, new_games(1, [passage(0)]), 1)
    pool.close()


# ---- a real server --------------------------------------------------------------------------------------------------


class Lent(Hosted):
    """The tests' common server, which a pool may neither start nor end."""

    def __init__(self, engine: SglangEngine) -> None:
        super().__init__()
        self.generate, self.abort, self.close_requests = engine.generate, engine.abort, engine.close_requests  # type: ignore


@pytest.fixture(scope="module")
def text(tiny_model: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    return lambda ids: tokenizer.decode(list(ids))


async def write(passage: Passage, iteration: int, slot: int, engine: Generator) -> Episode:
    """Four completions, longer ones for higher slots."""
    found = await engine.generate(list(passage.token_ids), 4, Sampling(1.0, 30 + 60 * slot, seed=slot))
    return Episode(iteration, slot, passage, "chat", "MCQ", tuple(Attempt(completion, None, None) for completion in found))


def test_completions_of_a_real_server_go_on_under_the_next_weights(engine: SglangEngine, text) -> None:
    """The weights are the same and only the version is another, so that the whole can be scored."""
    pool = RolloutPool(Topology(), dist.HashStore(), [Lent(engine)], write, passages_in_flight=6, decode=text)
    carried, episodes, num_aborted = [], [], 0
    try:
        for iteration in (1, 2, 3, 4):
            engine.begin_update()
            engine.end_update(str(iteration))
            games = carried + new_games(iteration, [passage(10 * iteration + each) for each in range(6 - len(carried))])
            played = pool.play(iteration, games, 2)
            carried, episodes, num_aborted = played.left, episodes + played.episodes, num_aborted + played.num_aborted
            assert (len(played.episodes), len(carried)) == (2, 4), pool.crew.last_words()
        assert num_aborted > 0
    finally:
        pool.close()
        engine.begin_update()
        engine.end_update("default")
    whole = [attempt.completion for episode in episodes for attempt in episode.attempts]
    assert any(completion.earlier for completion in whole), "none was continued"
    for episode in episodes:
        for attempt in episode.attempts:
            found, limit = attempt.completion, 30 + 60 * episode.slot
            assert len(found.completion_ids) == len(found.logprobs) <= limit
            assert found.finish == ("stop" if found.completion_ids[-1] == 2 else "length")
            assert found.finish == "stop" or len(found.completion_ids) == limit
            assert 2 not in found.completion_ids[:-1], "it went on after its end"
            scored = engine.score([*found.prompt_ids, *found.completion_ids])[len(found.prompt_ids) - 1 :]
            torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(scored), atol=1e-3, rtol=0)
            assert found.text == text(found.completion_ids)


def test_greedy_completions_cut_short_anywhere_end_as_if_they_had_not_been(engine: SglangEngine, text) -> None:
    prompts, sampling = [[40 + each, 41, 50] for each in range(4)], Sampling(0.0, 120, seed=0)

    async def through() -> list[list[Completion]]:
        return await asyncio.gather(*(engine.generate(prompt, 2, sampling) for prompt in prompts))

    async def cut() -> tuple[list[list[Completion]], int]:
        entries: list[Sequence[Entry]] = [()] * len(prompts)
        num_aborted = 0
        while True:
            recorders = [Recorder(engine, said, text) for said in entries]
            tasks = [asyncio.ensure_future(each.generate(prompt, 2, sampling)) for each, prompt in zip(recorders, prompts)]
            await asyncio.wait(tasks, timeout=random.uniform(0.005, 0.03))
            while not all(task.done() for task in tasks):
                await engine.abort()
                await asyncio.wait(tasks, timeout=0.05)
            entries = [recorder.said for recorder in recorders]
            num_aborted += sum(recorder.num_aborted for recorder in recorders)
            if any(task.exception() for task in tasks):
                continue
            if num_aborted > 3:
                return [task.result() for task in tasks], num_aborted
            entries = [()] * len(prompts)  # too quick to be cut short: once more

    async def both() -> tuple[list, list, int]:
        try:
            return await through(), *await cut()
        finally:
            await engine.close_requests()

    expected, found, num_aborted = asyncio.run(both())
    assert num_aborted > 3
    for one, other in zip(expected, found):
        for left, right in zip(one, other):
            assert (left.completion_ids, left.finish, left.text) == (right.completion_ids, right.finish, right.text)
            torch.testing.assert_close(torch.tensor(left.logprobs), torch.tensor(right.logprobs), atol=1e-3, rtol=0)


def test_a_stop_string_may_span_the_border(engine: SglangEngine, text) -> None:
    async def cut_at(border: int, stop: str | None) -> Completion:
        try:
            sampling = Sampling(0.0, 12, stop=(stop,) if stop else (), seed=0)
            [part] = await engine.generate([40, 41, 50], 1, replace(sampling, max_new_tokens=border))
            entry = Entry(part.prompt_ids, 0, (replace(part, finish="abort"),))
            [found] = await Recorder(engine, [entry], text).generate([40, 41, 50], 1, sampling)
            return found
        finally:
            await engine.close_requests()

    free = asyncio.run(cut_at(12, None))
    ids = free.completion_ids
    border = next(i for i in range(2, 10) if text(ids[i - 1 : i + 1]).isascii() and text(ids[:i]).count(text(ids[i - 1 : i + 1])) == 0)
    stop = text(ids[border - 1 : border + 1])
    found = asyncio.run(cut_at(border, stop))
    assert (found.completion_ids, found.finish) == (ids[: border + 1], "stop")
    assert found.text == text(ids[: border - 1]) and len(found.logprobs) == border + 1

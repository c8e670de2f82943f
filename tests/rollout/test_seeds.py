"""Samples by seed: the hash bit for bit, and a real server that is asked the same twice, in other company."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.game.journal import Recorder
from megatron_spice.game.records import Completion, Sampling
from megatron_spice.game.together import GamePutOff
from megatron_spice.rollout.cpu_seeds import murmur_hash32
from megatron_spice.rollout.supervisor import SglangEngine

Request = tuple[list[int], int, Sampling]


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words, as its reference has it."""
    state = 0
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
        word = (word << 15 | word >> 17) % 2**32 * 0x1B873593 % 2**32
        state ^= word
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def test_the_reference_is_murmur3() -> None:
    assert murmur3(b"abcd") == 0x43ED676A and murmur3(b"") == 0  # published values


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**20)), min_size=1, max_size=4), st.integers(1, 9))
def test_the_hash_is_murmur3_of_seed_position_and_token(rows: list[tuple[int, int]], columns: int) -> None:
    seeds, positions = (torch.tensor(each) for each in zip(*rows))
    found = murmur_hash32(seeds.to(torch.uint64), positions, torch.arange(columns))
    for row, (seed, position) in enumerate(rows):
        data = seed.to_bytes(8, "little") + position.to_bytes(4, "little")
        assert found[row].tolist() == [murmur3(data + token.to_bytes(4, "little")) for token in range(columns)]


@pytest.fixture(scope="module")
def seeded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    config = RolloutConfig(threads=1, max_total_tokens=4096, max_running_requests=32, deterministic=True)
    log = tmp_path_factory.mktemp("seeded") / "engine.log"
    engine = SglangEngine(config, Topology(), "fp32", tiny_model, log, load_format="auto")
    engine.launch()
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.close()


def ask(engine: SglangEngine, *requests: Request) -> list[list[Completion]]:
    async def all_of_them() -> list[list[Completion]]:
        try:
            return await asyncio.gather(*(engine.generate(*request) for request in requests))
        finally:
            await engine.close_requests()

    return asyncio.run(all_of_them())


def ids(group: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.completion_ids for completion in group]


PROMPT = [40, 41, 50]
SAMPLING = Sampling(1.0, 60, seed=11)


def test_the_same_seed_is_the_same_completion_whatever_else_runs(seeded: SglangEngine) -> None:
    [alone] = ask(seeded, (PROMPT, 8, SAMPLING))
    assert len(set(ids(alone))) == 8, "samples of one request must differ"
    crowd = [([60 + each, 41], 3, replace(SAMPLING, seed=1000 * each)) for each in range(7)]
    for _ in range(2):
        *others, again = ask(seeded, *crowd, (PROMPT, 8, SAMPLING))
        assert ids(again) == ids(alone)
        assert not set(ids(others[0])) & set(ids(alone))
    one_by_one = ask(seeded, *((PROMPT, 1, replace(SAMPLING, seed=SAMPLING.seed_of(each))) for each in range(8)))
    assert [ids(group)[0] for group in one_by_one] == ids(alone)
    [other] = ask(seeded, (PROMPT, 8, replace(SAMPLING, seed=500)))
    assert not set(ids(other)) & set(ids(alone))
    [narrow] = ask(seeded, (PROMPT, 8, replace(SAMPLING, top_p=0.5)))
    assert ids(narrow) == ids(ask(seeded, (PROMPT, 8, replace(SAMPLING, top_p=0.5)))[0])


def test_log_probabilities_are_still_those_of_the_policy(seeded: SglangEngine) -> None:
    """The noise decides what is drawn; what is returned is the distribution it is drawn from."""
    for completion in ask(seeded, (PROMPT, 4, SAMPLING))[0]:
        scored = seeded.score([*PROMPT, *completion.completion_ids])[len(PROMPT) - 1 :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(scored), atol=1e-3, rtol=0)


def test_draws_follow_the_distribution(seeded: SglangEngine) -> None:
    drawn = [one for group in ask(seeded, *((PROMPT, 32, Sampling(1.0, 1, seed=64 * each)) for each in range(32))) for one in group]
    counts: dict[int, int] = {}
    for one in drawn:
        counts[one.completion_ids[0]] = counts.get(one.completion_ids[0], 0) + 1
    probabilities = {one.completion_ids[0]: torch.tensor(one.logprobs[0]).exp().item() for one in drawn}
    for token, probability in probabilities.items():
        expected = probability * len(drawn)
        assert abs(counts[token] - expected) < 5 * max(1.0, expected) ** 0.5 + 3, (token, counts[token], expected)


def test_a_completion_that_was_cut_short_ends_as_if_it_had_not_been(seeded: SglangEngine) -> None:
    [through] = ask(seeded, (PROMPT, 6, replace(SAMPLING, max_new_tokens=200)))

    async def cut() -> tuple[list[Completion], int]:
        said, num_aborted = (), 0
        try:
            while True:
                recorder = Recorder(seeded, said, lambda ids: "")
                task = asyncio.ensure_future(recorder.generate(PROMPT, 6, replace(SAMPLING, max_new_tokens=200)))
                await asyncio.wait([task], timeout=random.uniform(0.01, 0.05))
                while not task.done():
                    await seeded.abort()
                    await asyncio.wait([task], timeout=0.02)
                said, num_aborted = recorder.said, num_aborted + recorder.num_aborted
                if not isinstance(task.exception(), GamePutOff):
                    if num_aborted:
                        return task.result(), num_aborted
                    said = ()  # too quick to be cut short: once more
        finally:
            await seeded.close_requests()

    found, num_aborted = asyncio.run(cut())
    assert num_aborted > 0 and ids(found) == ids(through)
    assert [completion.finish for completion in found] == [completion.finish for completion in through]

"""An engine without a server: what it says depends on a sample's seed and all ids before, and it can be cut short anywhere."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from megatron_spice.game.records import Completion, Sampling

FIRST = 0x110000
"""Ids below are code points, those from here on the phrases that the engine says."""
PHRASES = [" What is it?", "\nAnswer:", " Accra", " Lagos", "\n", "\n\n", ""]
END = FIRST + len(PHRASES) - 1
# What may follow a phrase; anything else may follow a prompt. Most of it is a task or an answer, some is neither.
FOLLOWERS = {0: [0, 1, 1, 1, 2], 1: [2, 2, 3], 2: [4, 4, 5, 6, 3, 3, 2], 3: [4, 4, 4, 2, 3], 4: [4, 2, 3, 6], 5: [0]}


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(each) if each < FIRST else PHRASES[each - FIRST] for each in ids)


class DiceEngine:
    """`abort` ends what runs; `steps_left` does it by itself after so many tokens of all requests together."""

    def __init__(self, version: str = "1", steps_left: int | None = None) -> None:
        self.version = version
        self.steps_left = steps_left
        self.num_requests = 0
        self._aborts = 0

    @property
    def is_over(self) -> bool:
        return self.steps_left == 0

    async def abort(self) -> None:
        self._aborts += 1

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        self.num_requests += 1
        assert sampling.seed is not None
        return await asyncio.gather(
            *(self._one(list(prompt_ids), sampling, sampling.seed_of(index)) for index in range(num_samples))
        )

    async def _one(self, prompt_ids: list[int], sampling: Sampling, seed: int | None) -> Completion:
        ids: list[int] = []
        logprobs: list[float] = []
        finish, aborts = "length", self._aborts
        while len(ids) < sampling.max_new_tokens:
            await asyncio.sleep(0)
            if self._aborts > aborts or self.is_over:
                finish = "abort"
                break
            if self.steps_left is not None:
                self.steps_left -= 1
            dice = random.Random(f"{seed} {prompt_ids + ids}")
            last = (prompt_ids + ids)[-1] - FIRST
            ids.append(FIRST + (dice.choice(FOLLOWERS[last]) if last in FOLLOWERS else dice.choice([0, 0, 0, 2, 2, 3, 3, 5])))
            logprobs.append(-dice.random())
            if ids[-1] == END or any(stop in decode(ids) for stop in sampling.stop):
                finish = "stop"
                break
        text = decode(ids)
        ends = [place for place in map(text.find, sampling.stop) if place >= 0]
        text = text[: min(ends)] if ends else text
        return Completion(tuple(prompt_ids), tuple(ids), tuple(logprobs), finish, text, self.version)

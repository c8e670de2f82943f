"""Two engines that play as one: the policy's, and one beside it that asks the questions and is never updated.

To the pool and the sync they are a single `Engine`, so that what holds for one holds for both: they are up together, lost
together (whichever failed), replaced together, and cut short together. The price is that a healthy one is restarted with the
other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout.engine import MEMORY, Engine

if TYPE_CHECKING:
    import torch

FIXED = "fixed"
"""The weight version of what the engine beside has said."""


class TwoEngines:
    """Requests of the Challenger go to `beside`, all others and every update to `policy`."""

    def __init__(self, policy: Engine, beside: Engine) -> None:
        self.policy = policy
        self.beside = beside

    def launch(self) -> None:
        """See `Engine`."""
        self.policy.launch()
        self.beside.launch()

    def wait_ready(self) -> None:
        """See `Engine`."""
        self.policy.wait_ready()
        self.beside.wait_ready()

    def close(self) -> None:
        """See `Engine`."""
        try:
            self.policy.close()
        finally:
            self.beside.close()

    def kill(self) -> None:
        """See `Engine`."""
        try:
            self.policy.kill()
        finally:
            self.beside.kill()

    def check(self) -> None:
        """See `Engine`."""
        self.policy.check()
        self.beside.check()

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """See `Engine`."""
        if sampling.role != "challenger":
            return await self.policy.generate(prompt_ids, num_samples, sampling)
        said = await self.beside.generate(prompt_ids, num_samples, sampling)
        return [replace(completion, weight_version=FIXED) for completion in said]

    async def abort(self) -> None:
        """See `Engine`."""
        await asyncio.gather(self.policy.abort(), self.beside.abort())

    async def close_requests(self) -> None:
        """See `Engine`."""
        await asyncio.gather(self.policy.close_requests(), self.beside.close_requests())

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """See `Engine`."""
        self.policy.sleep(kinds)
        self.beside.sleep(kinds)

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """See `Engine`."""
        self.policy.wake(kinds)
        self.beside.wake(kinds)

    def begin_update(self) -> None:
        """See `Engine`."""
        self.policy.begin_update()

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """See `Engine`."""
        self.policy.update_bucket(named_tensors)

    def end_update(self, version: str) -> None:
        """See `Engine`."""
        self.policy.end_update(version)

    def weight_version(self) -> str:
        """The policy's; of what the engine beside says it is always `FIXED`."""
        return self.policy.weight_version()

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """By the policy's."""
        return self.policy.score(token_ids)

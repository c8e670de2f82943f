"""Many small jobs for one engine, as many at a time as the recipe plays passages, and a file of what came of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_spice.config.schema import Config
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.game.play import Table, Wording
from megatron_spice.game.verify import Verifier
from megatron_spice.rollout.engine import Engine, EngineRefused
from megatron_spice.telemetry.json_lines import read_json_lines

Item = TypeVar("Item")


async def session(
    config: Config, engine: Engine, tokenizer: TextTokenizer, seed: int, items: Sequence[tuple[int, Item]],
    work: Callable[[Table, Item], Awaitable[None]],
) -> None:  # fmt: skip
    """Does `work` for each of `items`, which come with the slot that their choices derive from.

    Raises:
        EngineError: the engine failed; what runs is cancelled, and over when this is raised.
    """
    room = asyncio.Semaphore(config.rollout.passages_in_flight)
    wording, rollout = Wording.of(config.game.prompt_style, tokenizer), config.rollout
    async with Verifier(config.game.verifier) as verifier:

        async def one(slot: int, item: Item) -> None:
            async with room:
                seeds = (seed, 0, slot)
                await work(Table(engine, verifier, config.game, wording, wording, rollout.temperature, rollout.top_p, seeds), item)

        async def watch() -> None:
            while True:
                engine.check()
                await asyncio.sleep(0.5)

        jobs = [asyncio.ensure_future(one(slot, item)) for slot, item in items]
        watching, working = asyncio.ensure_future(watch()), asyncio.gather(*jobs)
        try:
            done, _ = await asyncio.wait([watching, working], return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for task in (watching, *jobs):
                task.cancel()
            await asyncio.gather(watching, *jobs, working, return_exceptions=True)
            await engine.close_requests()


def refusal(error: EngineRefused) -> str:
    """What is noted of a job that the engine refused for what it asks, which it would refuse again.

    Raises:
        EngineRefused: it was refused for another reason, as a wrong key.
    """
    if error.status != 400:
        raise error
    return str(error).partition("\n")[0]


def note(path: Path, line: dict[str, Any]) -> None:
    """Adds what one job has come to."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair as JSON spells it
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def noted(path: Path) -> list[dict[str, Any]]:
    """What earlier jobs have come to; half a line that an interrupted one left behind is taken away."""
    if not path.exists():
        return []
    found = read_json_lines(path)
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(whole)
    return found

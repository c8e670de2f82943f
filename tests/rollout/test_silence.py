"""Requests that wait in a busy server's queue, and servers that answer nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_spice.cluster.ports import LOOPBACK
from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout import client as client_module
from megatron_spice.rollout.client import EngineClient
from megatron_spice.rollout.engine import EngineError
from megatron_spice.rollout.pulse import Silence

PATIENCE = 0.6  # seconds
GOOD = {
    "text": "a",
    "meta_info": {"output_token_logprobs": [[-0.5, 7, None]], "finish_reason": {"type": "length"}, "weight_version": "3"},
}


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LOOK", 0.05)


def ask(count: int, serve: Callable[[int], Awaitable[None]]) -> list[list[Completion] | BaseException]:
    """As many requests at once, their numbers in the prompts; `serve` returns when one is to be answered."""

    async def generate(request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        await serve(body["input_ids"][0])
        return web.Response(text=json.dumps(GOOD))

    async def everything() -> list[list[Completion] | BaseException]:
        application = web.Application()
        application.router.add_post("/generate", generate)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, LOOPBACK, 0)
        await site.start()
        asked = EngineClient(f"http://{LOOPBACK}:{runner.addresses[0][1]}", "key", request_timeout=PATIENCE)
        try:
            return await asyncio.gather(*(asked.generate([number], 1, Sampling(1.0, 1)) for number in range(count)), return_exceptions=True)
        finally:
            assert asked.num_running == 0
            await asked.close_requests()
            await runner.cleanup()

    return asyncio.run(everything())


def test_a_request_waits_for_as_long_as_its_server_answers_others() -> None:
    """Eight, one after the other: the last waits for four times the timeout."""
    turn = asyncio.Lock()

    async def one_at_a_time(number: int) -> None:
        async with turn:
            await asyncio.sleep(PATIENCE / 2)

    began = time.monotonic()
    answers = ask(8, one_at_a_time)
    assert time.monotonic() - began > 3 * PATIENCE
    assert all(isinstance(answer, list) and answer[0].completion_ids == (7,) for answer in answers), answers


def test_a_server_that_answers_nothing_is_given_up() -> None:
    async def never(number: int) -> None:
        await asyncio.sleep(60)

    began = time.monotonic()
    answers = ask(3, never)
    assert PATIENCE < time.monotonic() - began < PATIENCE + 5
    assert all(isinstance(answer, EngineError) and "none was answered for 0.6 s (rollout.request_timeout)" in str(answer) for answer in answers)


def test_a_lost_answer_is_missed_once_the_others_are_there() -> None:
    async def loses_the_first(number: int) -> None:
        await asyncio.sleep(60 if number == 0 else number * PATIENCE / 2)

    first, *rest = ask(5, loses_the_first)
    assert isinstance(first, EngineError) and all(isinstance(answer, list) for answer in rest)


def test_patience_is_not_used_up_by_time_in_which_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the whole machine was suspended."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    silence = Silence(10.0)
    for now in (1.0, 2.0, 500.0, 501.0):  # noqa: B007  it is what the clock shows
        assert not silence.is_too_long()
    for now in range(502, 509):
        is_over = silence.is_too_long()
    assert is_over
    silence.heard()
    assert not silence.is_too_long()

"""Engines whose compute is simulated, for `tools/benchmark.py scaling`: real HTTP servers that wait instead of computing.

Each port speaks the verbs that `EngineClient` uses of an SGLang server. A generation is answered after as long as decoding its
longest sample takes at `seconds_per_token`; all of a server's requests decode side by side, as in a batch that is not full.
Lengths have a long tail (log-normal, cut at the request's limit). Those of a request are spread evenly over it, in an order drawn
from a hash of the prompt: every request takes as long as every other, as weak scaling supposes. With `tails` they are drawn from
it, and the more requests there are the longer the longest takes. A rerun draws the same. The ids are random, the text is a short
task or answer, as the stop strings tell which role asks. Weights are accepted and thrown away after a wait.

One process serves all ports of a benchmark: a single event loop is enough, since it has next to nothing to compute. What it does
compute it does within the waits, which begin when a request arrives.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from megatron_spice.rollout.client import EngineClient

TASKS = (" What is it?\nAnswer: Accra", " Which river is it?\nAnswer: Volta", " What does it export?\nAnswer: gold")
UNREADABLE = " It is not known"
ANSWERS = (" Accra", " Volta", " gold")
CHALLENGER_STOP = "\n\n"
BANK = 4096
"""Sampled tokens that are drawn, and put into JSON, once for all ports; a sample is a stretch of them."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long simulated work takes (seconds), and how long what is written is (tokens: median by role, spread of the
    logarithm)."""

    per_token: float
    prefill: float
    update: float
    hand_over: float
    challenger_tokens: float
    reasoner_tokens: float
    spread: float
    vocabulary: int
    seed: int
    tails: bool = False


def lengths(pace: Pace, prompt_ids: Sequence[int], count: int, limit: int, challenger: bool) -> tuple[list[int], random.Random]:
    """Tokens of each of a request's samples, and the generator that goes on from there."""
    rng = random.Random(f"{pace.seed} {hash(tuple(prompt_ids))}")
    median = pace.challenger_tokens if challenger else pace.reasoner_tokens
    if pace.tails:
        deviations = [rng.gauss(0.0, pace.spread) for _ in range(count)]
    else:
        deviations = [pace.spread * NormalDist().inv_cdf((each + 0.5) / count) for each in range(count)]
        rng.shuffle(deviations)
    drawn = [max(1, round(median * math.exp(each))) for each in deviations]
    return [min(limit, each) for each in drawn], rng


def request_seconds(pace: Pace, longest: int) -> float:
    """How long a request takes whose longest sample has so many tokens."""
    return pace.prefill + longest * pace.per_token


def serve(sockets: Sequence[socket.socket], pace: Pace) -> None:
    """Serves one engine on each listening socket, until the process ends."""
    asyncio.run(_serve(sockets, pace))


async def _serve(sockets: Sequence[socket.socket], pace: Pace) -> None:
    from aiohttp import web

    rng = random.Random(pace.seed)
    bank = [f"[{-4.0 * rng.random():.4f},{rng.randrange(pace.vocabulary)},null]" for _ in range(BANK)]
    for each in sockets:
        runner = web.AppRunner(_Server(pace, bank).application(), access_log=None)
        await runner.setup()
        await web.SockSite(runner, each, backlog=1024).start()
    await asyncio.Event().wait()


class _Server:
    """One port."""

    def __init__(self, pace: Pace, bank: Sequence[str]) -> None:
        self._pace = pace
        self._bank = bank
        self._version = "default"

    def application(self) -> Any:
        from aiohttp import web

        app = web.Application(client_max_size=2**30)
        waits = {
            "/begin_weight_update": 0.0, "/end_weight_update": 0.0, "/flush_cache": 0.0, "/freeze_gc": 0.0, "/abort_request": 0.0,
            "/update_weights_from_tensor": self._pace.update, "/release_memory_occupation": self._pace.hand_over,
            "/resume_memory_occupation": self._pace.hand_over,
        }  # fmt: skip
        for path, seconds in waits.items():
            app.router.add_post(path, self._after(seconds))
        app.router.add_get("/ready", self._after(0.0))
        app.router.add_get("/model_info", self._model_info)
        app.router.add_post("/update_weight_version", self._set_version)
        app.router.add_post("/generate", self._generate)
        return app

    def _after(self, seconds: float) -> Any:
        from aiohttp import web

        async def handler(request: Any) -> Any:
            end = asyncio.get_running_loop().time() + seconds
            await request.read()
            await _sleep_until(end)
            return web.json_response({"success": True})

        return handler

    async def _model_info(self, request: Any) -> Any:
        from aiohttp import web

        return web.json_response({"weight_version": self._version})

    async def _set_version(self, request: Any) -> Any:
        from aiohttp import web

        self._version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _generate(self, request: Any) -> Any:
        from aiohttp import web

        began = asyncio.get_running_loop().time()
        body = json.loads(await request.read())
        asked, pace = body["sampling_params"], self._pace
        limit, challenger = asked["max_new_tokens"], CHALLENGER_STOP in asked["stop"]
        found, rng = lengths(pace, body["input_ids"], asked["n"], limit, challenger)
        text = f"[{','.join(self._output(length, length >= limit, challenger, rng) for length in found)}]"
        await _sleep_until(began + request_seconds(pace, max(found)))
        return web.json_response(text=text)

    def _output(self, length: int, is_cut: bool, challenger: bool, rng: random.Random) -> str:
        text = rng.choice((*TASKS, UNREADABLE) if challenger else ANSWERS)
        first = rng.randrange(BANK - length)
        sampled = ",".join(self._bank[first : first + length])
        about = json.dumps({"finish_reason": {"type": "length" if is_cut else "stop"}, "weight_version": self._version})
        return f'{{"text":{json.dumps(text)},"meta_info":{{"output_token_logprobs":[{sampled}],{about[1:]}}}'


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - asyncio.get_running_loop().time()))


class SimulatedEngine(EngineClient):
    """The engine of one rank: a client of one of the ports. There is no process of its own to start, watch or end."""

    def __init__(self, url: str, request_timeout: float) -> None:
        super().__init__(url, "", request_timeout=request_timeout)

    @classmethod
    def maker(cls, urls: Sequence[str]) -> Any:
        """What makes a run's engines, called as `SglangEngine` is."""

        def make(config: Any, topology: Any, precision: str, model: Path, log_path: Path, **more: Any) -> SimulatedEngine:
            return cls(urls[topology.rank], config.request_timeout)

        return make

    def launch(self) -> None:
        """See `Engine.launch`."""

    def wait_ready(self) -> None:  # type: ignore[override]
        """See `Engine.wait_ready`."""
        super().wait_ready(60.0)

    def check(self) -> None:
        """See `Engine.check`."""

    def kill(self) -> None:
        """See `Engine.kill`."""

    def close(self) -> None:
        """See `Engine.close`."""

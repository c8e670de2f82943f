"""A run of a tiny recipe whose engine has no server, and loses it once; run by test_run_state.py on a gloo rank."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
from pathlib import Path
from typing import Any


def run(recipe: Path, overrides: list[str], failures: int, ends: bool = False) -> tuple[str, int]:
    """Trains with an engine that fails `failures` times; returns what the run has printed, and its exit code. With `ends` the run is
    asked to end while the engine is started after the last failure, and that is not waited for."""
    from megatron_spice.cluster import platform

    platform.prepare("cpu")
    from megatron_spice import assemble, train
    from megatron_spice.config.loader import load_config
    from megatron_spice.game.records import Completion, Sampling
    from megatron_spice.rollout.engine import EngineError

    left = [failures]

    class LosableEngine:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self._version = ""
            self._is_ending = named["is_ending"]

        def _nothing(self, *arguments: Any) -> None:
            pass

        def wait_ready(self) -> None:
            if ends and not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
                if self._is_ending():
                    raise EngineError("not waited for")

        launch = close = kill = check = sleep = wake = begin_update = update_bucket = _nothing

        async def abort(self) -> None:
            pass

        async def close_requests(self) -> None:
            pass

        def end_update(self, version: str) -> None:
            self._version = version

        async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
            await asyncio.sleep(0.002)
            if left[0]:
                left[0] -= 1
                raise EngineError("lost for the test")
            ids = tuple(random.Random(sampling.seed).randrange(60, 200) for _ in range(sampling.max_new_tokens))
            return [Completion(tuple(prompt_ids), ids, (-1.0,) * len(ids), "length", str(ids), self._version)] * num_samples

    class NoVerifier:
        def __init__(self, config: Any) -> None:
            pass

        async def start(self) -> None:
            pass

        async def close(self) -> None:
            pass

    assemble.Verifier, assemble.copy_rate = NoVerifier, lambda device: 1e9
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            train.train(load_config(recipe, overrides), lambda *arguments: assemble.assemble(*arguments, make_engine=LosableEngine))
        except SystemExit as end:
            code = end.code
    return printed.getvalue(), code

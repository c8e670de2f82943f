"""Killable worker processes behind one `ask`: at most `timeout` seconds an answer, whatever is asked.

The timeout counts from when a worker takes the request, not from when it queues. A worker that is late, dies, or whose
answer is no longer wanted (cancellation) is killed, and its place is filled by a fresh one when the next request comes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from megatron_spice.config.schema import VerifierConfig

START_TIMEOUT = 120.0
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class WorkerTimeout(Exception):
    """A request took longer than `game.verifier.timeout`."""


class WorkerCrash(Exception):
    """A worker died on a request (memory limit, stack overflow)."""


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts the process and waits until it has loaded Math-Verify.

        Raises:
            RuntimeError: it ended or took too long; the message carries what it printed.
        """
        if self._process is not None:
            return
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "megatron_spice.game.verify_worker",
            str(self._config.timeout), str(self._config.memory_mb), str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT)
        except asyncio.TimeoutError:
            await self.kill()
            raise RuntimeError(
                f"a verifier worker did not come up in {START_TIMEOUT:.0f} s; is the machine overloaded?"
            ) from None
        except BaseException:
            await self.kill()
            raise
        if line != b'{"ready": true}\n':
            code = await self.kill()
            raise RuntimeError(
                f"a verifier worker ended at its start (exit code {code}). Is math-verify installed, and is "
                f"game.verifier.memory_mb={self._config.memory_mb} enough? "
                f"Try: python -m megatron_spice.game.verify_worker 2 1024 $$"
            )

    async def ask(self, request: dict[str, str | None]) -> bool:
        """The worker's answer; the process is gone after anything but an answer."""
        await self.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            line = await asyncio.wait_for(self._process.stdout.readline(), self._config.timeout)
            return bool(json.loads(line)["result"])
        except asyncio.TimeoutError:
            await self.kill()
            raise WorkerTimeout from None
        except (OSError, ValueError, LookupError):
            await self.kill()
            raise WorkerCrash from None
        except BaseException:
            await self.kill()
            raise

    async def kill(self) -> int | None:
        """Ends the process, if there is one, and reaps it."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.kill()
        except ProcessLookupError:
            pass
        process.stdin.close()
        return await process.wait()


class WorkerPool:
    """`config.workers` processes for one asyncio loop: `start`, any number of concurrent `ask`s, `close`."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._workers: list[_Worker] = []
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()

    async def start(self) -> None:
        """Starts all workers. Raises RuntimeError when one does not come up; none is left behind then."""
        self._idle = asyncio.Queue()
        self._workers = [_Worker(self._config) for _ in range(self._config.workers)]
        try:
            await asyncio.gather(*(worker.start() for worker in self._workers))
        except BaseException:
            await self.close()
            raise
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def ask(self, gold: str, prediction: str | None = None) -> bool:
        """Whether two LaTeX expressions are equal, or (one given) whether it can be read.

        Raises:
            WorkerTimeout, WorkerCrash: no answer; the worker is replaced.
            RuntimeError: the pool is not started, or a fresh worker does not come up.
        """
        if not self._workers:
            raise RuntimeError("the verifier is not started: call start() (or use `async with`) first")
        worker = await self._idle.get()
        try:
            return await worker.ask({"gold": gold, "prediction": prediction})
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """Ends all workers; the pool can be started again."""
        workers, self._workers = self._workers, []
        await asyncio.gather(*(worker.kill() for worker in workers))

"""Processes that write the parts of a target, and what a person sees of it.

Each takes the next part that nobody has, so they end at about the same time. They are forked, so that starting one costs
milliseconds. While a part is on its way to the disk the next one is written to memory. They never outlive the parent: the
kernel ends them with it, however it ends, and a part they were at is written again the next time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

import torch

from megatron_spice.cluster.children import die_with_parent
from megatron_spice.convert.target import Advance, Part, Written

Write = Callable[[Part, Advance], Written]
Keep = Callable[[Sequence[tuple[Part, Written]]], None]
_FORK = multiprocessing.get_context("fork")


class WorkerFailed(RuntimeError):
    """A process ended before its work did."""


def write_parts(
    parts: Sequence[Part], write: Write, keep: Keep, processes: int, progress: Callable[[int], None]
) -> None:
    """Calls `write` for each part, and `keep` with parts that were written, in several processes; `progress` is told of all
    bytes written so far.

    Raises:
        OSError, ValueError: what they raised.
        WorkerFailed: a process was killed.
    """
    count = min(processes, len(parts))
    taken = _FORK.Value("q", 0)
    written = _FORK.Array("q", max(1, count), lock=False)
    workers, replies = [], []
    try:
        for slot in range(count):
            reply, theirs = _FORK.Pipe(duplex=False)
            arguments = (parts, write, keep, taken, written, slot, theirs, os.getpid())
            workers.append(_FORK.Process(target=_work, args=arguments, daemon=True))
            workers[-1].start()
            theirs.close()
            replies.append(reply)
        waiting = {worker.sentinel: number for number, worker in enumerate(workers)}
        while waiting:
            for sentinel in wait(list(waiting), timeout=0.2):
                number = waiting.pop(sentinel)
                _check(workers[number], replies[number])
            progress(sum(written))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _check(worker: Any, reply: Connection) -> None:
    worker.join()
    if reply.poll():
        try:
            raise reply.recv()
        except EOFError:
            pass
    if worker.exitcode != 0:
        how = f"by signal {-worker.exitcode}" if worker.exitcode < 0 else f"with exit code {worker.exitcode}"
        hint = "; the machine may be out of memory: give fewer --processes" if worker.exitcode == -signal.SIGKILL else ""
        raise WorkerFailed(f"a process was ended {how}{hint}")


def _work(
    parts: Sequence[Part], write: Write, keep: Keep, taken: Any, written: Any, slot: int, reply: Connection, parent: int
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def advance(count: int) -> None:
        written[slot] += count

    try:
        with _Keeper(keep) as keeper:
            while (number := _take(taken)) < len(parts):
                keeper.put(parts[number], write(parts[number], advance))
    except (OSError, ValueError) as error:
        reply.send(error)


def _take(taken: Any) -> int:
    """The next part's number."""
    with taken.get_lock():
        taken.value += 1
        return taken.value - 1


class _Keeper:
    """A thread that keeps parts while the next are written. What comes while it is at it is kept together: bringing a file to
    the disk brings all of it, so once for many parts is cheaper than once for each."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._waiting: SimpleQueue[tuple[Part, Written] | None] = SimpleQueue()
        self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> _Keeper:
        self._keeping = self._executor.submit(self._run)
        return self

    def put(self, part: Part, written: Written) -> None:
        """Hands a part over. Raises what keeping an earlier one did."""
        self._waiting.put((part, written))
        if self._keeping.done():
            self._keeping.result()

    def __exit__(self, *exc: object) -> None:
        self._waiting.put(None)
        self._executor.shutdown()
        self._keeping.result()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            is_over = None in batch
            self._keep([each for each in batch if each is not None])


class Progress:
    """A line on standard error that is renewed in place; in a log it is a new line every ten seconds."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        """
        Args:
            total: bytes in all.
            done: bytes that were there before.
        """
        self.label, self.total, self.done = label, total, done
        self.start = self._shown = time.monotonic()
        self._in_place = sys.stderr.isatty()

    def __call__(self, written: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._in_place else 10.0):
            return
        self._shown = now
        print(self.line(written, now - self.start), end="\r" if self._in_place else "\n", file=sys.stderr, flush=True)

    def line(self, written: int, seconds: float) -> str:
        """`hf-to-megatron: 41 % of 16.1 GB, 1.20 GB/s, 8 s left`."""
        there, rate = self.done + written, written / max(seconds, 1e-9)
        left = f"{(self.total - there) / rate:.0f} s left" if rate else "..."
        return f"{self.label}: {100 * there // max(1, self.total)} % of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, {left}  "

    def end(self) -> None:
        """Takes the line away."""
        if self._in_place:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)

"""Makes parts in forked processes, one for each core, in order, and notices whatever happens to one of them.

Workers are forked when everything that they share is loaded: the tokenizer costs its time and memory once. Each takes the next
part as soon as it has finished one. They count in memory shared with this process, and send a message only when a part has ended.

What is wrong with an input is told of the first part in order that has something wrong, as one worker alone would: the parts
before it are waited for. Whatever else goes wrong ends the run at once. Finished parts stay, so the next run goes on with them.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Protocol

import numpy as np

_TICK = 0.1  # seconds between two reports of progress


class Maker(Protocol):
    """What workers run, see `PartMaker`."""

    def make(self, number: int, counts: np.ndarray, check: Callable[[], None]) -> None: ...


class WorkerLost(RuntimeError):
    """A worker process ended in the midst of a part."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def make_parts(
    maker: Maker, numbers: Sequence[int], workers: int, num_counts: int, on_tick: Callable[[np.ndarray], None]
) -> Iterator[int]:
    """Make the parts of these numbers; yields each number when its part is finished, in the order in which they finish.

    Args:
        on_tick: called several times a second with the workers' counts added up, i64 [num_counts].

    Raises:
        ValueError: an input is at fault.
        OSError: something could not be read or written.
        WorkerLost: a worker was killed; RuntimeError: it failed.
    """
    crew = _Crew(maker, list(numbers), min(workers, len(numbers)), num_counts)
    try:
        while crew.is_busy:
            yield from crew.wait()
            on_tick(crew.counts.sum(axis=0))
        if crew.failures:
            raise crew.failures[min(crew.failures)]
    finally:
        crew.kill()


class _Crew:
    """The worker processes.

    Attributes:
        counts: each worker's, i64 [workers, num_counts].
        failures: what was wrong with the input of a part, by its number.
    """

    def __init__(self, maker: Maker, numbers: list[int], workers: int, num_counts: int):
        self._waiting = numbers[::-1]
        shared = mmap.mmap(-1, max(workers * num_counts, 1) * 8)
        self.counts = np.frombuffer(shared, dtype=np.int64)[: workers * num_counts].reshape(workers, num_counts)
        self.failures: dict[int, Exception] = {}
        self._making: dict[Connection, int] = {}
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        context = multiprocessing.get_context("fork")
        gc.freeze()  # so that a worker's garbage collector does not touch, and so copy, what it shares
        try:
            for place in range(workers):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(maker, there, here, self.counts[place], os.getpid()), daemon=True
                )
                process.start()
                there.close()
                self._processes[here] = process
                self._hand_out(here)
        finally:
            gc.unfreeze()

    @property
    def is_busy(self) -> bool:
        """Whether a part is being made that still matters: one before the first that failed."""
        first_failed = min(self.failures, default=None)
        return any(first_failed is None or number < first_failed for number in self._making.values())

    def wait(self) -> list[int]:
        """Numbers of parts that were finished during a moment; raises when a worker is lost or cannot go on."""
        finished = []
        for connection in wait(list(self._making), timeout=_TICK):
            assert isinstance(connection, Connection)
            number = self._making.pop(connection)
            try:
                error = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._loss(connection, number) from None
            if error is None:
                finished.append(number)
            elif isinstance(error, ValueError):
                self.failures[number] = error
            else:
                raise error
            self._hand_out(connection)
        return finished

    def kill(self) -> None:
        """End all workers. They hold nothing of worth: an unfinished part is made again."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()

    def _hand_out(self, connection: Connection) -> None:
        if self._waiting and not self.failures:
            self._making[connection] = self._waiting.pop()
            with suppress(BrokenPipeError):  # the loss is noticed when its answer is waited for
                connection.send(self._making[connection])

    def _loss(self, connection: Connection, number: int) -> WorkerLost:
        process = self._processes[connection]
        process.join(10)
        code = process.exitcode
        why = f"exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            why = name + (", most often because memory ran out: try fewer --workers" if name == "SIGKILL" else "")
        return WorkerLost(f"the worker that made part {number} was ended from outside ({why})")


def _work(maker: Maker, connection: Connection, other_end: Connection, counts: np.ndarray, parent: int) -> None:
    """A worker's life: part numbers come, None or an error goes back."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each

    def check() -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for this part any more

    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            number = connection.recv()
            connection.send(_try(maker, number, counts, check))


def _try(maker: Maker, number: int, counts: np.ndarray, check: Callable[[], None]) -> Exception | None:
    try:
        maker.make(number, counts, check)
    except (ValueError, OSError) as error:
        return _plain(error)
    except MemoryError:
        return RuntimeError(f"part {number}: out of memory; try fewer --workers")
    except BaseException:  # noqa: BLE001 (the parent tells of it)
        return RuntimeError(f"part {number} failed:\n{traceback.format_exc()}")
    return None


def _plain(error: ValueError | OSError) -> Exception:
    """The error as one that can be sent whatever class it was."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), *([str(error.filename)] if error.filename else []))
    return ValueError(str(error))

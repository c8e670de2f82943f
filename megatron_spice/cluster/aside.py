"""Doing what may take for ever where nobody has to wait for it: in a thread that the process's end takes along.

A question to a machine that is gone, and a write to a file system that has died, do not fail: they never return. Whoever has to
go on asks with a time limit (`answer`), or has it done behind itself and looks later whether it was (`Aside`). It helps only with
what gives Python's lock away while it waits, as `os.write` does, and `faulthandler.dump_traceback` does not.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any


class NoAnswer(Exception):
    """Nothing came in time."""


def answer(question: Callable[[], Any], seconds: float) -> Any:
    """What `question` returns, within so many seconds.

    Raises:
        NoAnswer: it has not returned by then.
        Exception: its own.
    """
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="a question", daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswer from None
    if error is not None:
        raise error
    return found


class Aside:
    """Does one thing after the other behind whoever asks for it; what fails is left out."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def later(self, action: Callable[[], object]) -> None:
        """Has it done after all that was asked for before."""
        self._asked.put(action)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="aside", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all is done, waited for at most so long."""
        done = threading.Event()
        self.later(done.set)
        return done.wait(seconds)

    def _work(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                self._asked.get()()

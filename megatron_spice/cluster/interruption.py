"""Being asked to end: by Slurm before a time limit or a preemption, by an administrator, by Ctrl-C.

A rank that gets SIGTERM, SIGINT or SIGUSR1 only notes it. Ending is something that all ranks do together, at a place where
what they hold is worth saving, so they have to hear of it and to agree where:

    while passages are played    every rank looks at a key in the store; the games are given up, what was before them is saved
    anywhere else                the step is finished; ranks agree at the end of the iteration, and save

Each may come any number of times: Slurm sends them to all of a job's processes, the launcher passes on what it gets, and torchrun
ends by SIGTERM the ranks that a failure has left. Whoever will not wait sends the launcher a second one: its ranks end with it.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_KEY = "interruption"


class Interrupted(Exception):
    """The job was asked to end while passages were being played; raised on every rank."""


class Interruption:
    """What one rank knows of it. Made in the main thread, since it installs the signals' handlers.

    Args:
        store: shared by all ranks, with an atomic `add`.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._signal: int | None = None
        self._announced = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def noted(self) -> bool:
        """Whether this rank itself was asked to end."""
        return self._signal is not None

    @property
    def reason(self) -> str:
        """What this rank was asked by."""
        return "another rank was asked to end" if self._signal is None else signal.Signals(self._signal).name

    def asked(self) -> bool:
        """Whether any rank was asked to end; tells the others when it was this one. One question to the store."""
        if self._signal is not None and not self._announced:
            self._announced = True
            self._store.add(_KEY, 1)
        return self._store.add(_KEY, 0) > 0

    def agreed(self) -> bool:
        """Whether any rank was asked to end, the same answer on all; a collective of all ranks."""
        word = torch.tensor([int(self._signal is not None)])
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return bool(word)

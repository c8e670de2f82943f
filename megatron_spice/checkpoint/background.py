"""Making a checkpoint of a snapshot, in a thread beside the run.

Everything but the snapshot is here, from the check for room to the rename, so nothing of a save is in an iteration's way. All
ranks' threads go through it together, over a gloo group that nothing else uses: collectives of a thread and of the main one
would meet on a group that they shared. There are few and they carry no tensors:

    1  the bytes to come are added up, the first rank looks for room and makes the folder
    2  every rank writes its own file
    3  the first rank hears from all, writes the index and the run state, renames the folder, and says how it ended

A thread and not a process: writing is files and fsync, which need no interpreter lock, and a fork of a process with CUDA,
gloo and a server's connections in it is a risk that nobody would see until it hangs. It has a lower priority than the run, for
on a CPU the engines play on the same cores.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_spice.checkpoint import store
from megatron_spice.checkpoint.distcp import Record, file_size, write_file, write_index
from megatron_spice.checkpoint.hf_files import copy_small_files
from megatron_spice.checkpoint.ownership import Displaced, Ownership
from megatron_spice.checkpoint.pieces import Holdings
from megatron_spice.config.errors import StorageError

NICENESS = 10


@dataclass(frozen=True)
class Target:
    """What is made of the tensors: a checkpoint of an iteration in a run's `folder`, of which the newest `keep` stay.

    `home` is the identity of the run's own folder: one that is gone is not made anew, elsewhere perhaps. `owner` is the first rank's
    hold on it, None elsewhere and for a run that is alone.
    """

    folder: Path
    home: tuple[int, int] | None
    state: dict[str, Any]
    keep: int
    hf_files: Path
    owner: Ownership | None = None

    @property
    def final(self) -> Path:
        """Where it will be."""
        return self.folder / store.name_of(self.state["iteration"])

    def begin(self, num_bytes: int) -> Path:
        """Makes the folder where it lies until it is whole. Raises OSError without room for `num_bytes`, or without the run's folder."""
        if store.identity(self.folder.parent) != self.home:
            raise OSError(f"{self.folder.parent} is not the folder that the run began in: it was moved, removed or unmounted")
        attempt = store.ALONE if self.owner is None else self.owner.mine.token
        partial = store.begin(self.folder, self.state["iteration"], num_bytes, attempt, self._look)
        copy_small_files(self.hf_files, partial / store.HF)
        return partial

    def finish(self, partial: Path, records: list[Record], common: dict[str, Any]) -> None:
        """Makes it whole."""
        write_index(partial / store.WEIGHTS, records, common)
        store.finish(partial, self.state, self.keep, self._look)

    def _look(self) -> None:
        """Raises Displaced if the run has lost its folder."""
        if self.owner is not None:
            self.owner.check()


@dataclass
class Ranks:
    """The ranks of a save: a group of all, None if none is needed, and which this one is."""

    group: dist.ProcessGroup | None
    rank: int = field(default_factory=lambda: dist.get_rank())

    def first_does(self, act: Callable[[], Any]) -> Any:
        """The first rank acts, and all have what that returns. Raises OSError on all ranks where it fails, and Displaced."""
        told: list[Any] = [None, None, False]
        if self.rank == 0:
            try:
                told[0] = act()
            except Exception as error:  # whatever it is, the others wait to hear of it
                told = [None, _reason(error), isinstance(error, Displaced)]
        dist.broadcast_object_list(told, 0, group=self.group)
        made, reason, is_displaced = told
        if reason is not None:
            raise (Displaced if is_displaced else OSError)(reason)
        return made

    def tell_all(self, what: Any) -> list[Any]:
        """What every rank has to say."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, what, group=self.group)
        return everyone

    def tell_first(self, what: Any) -> list[Any]:
        """What every rank has to say, on the first; nothing elsewhere."""
        everyone: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(what, everyone, 0, group=self.group)
        return everyone or []


def write(target: Target, held: Holdings, ranks: Ranks) -> dict[str, float]:
    """Makes a checkpoint of what all ranks hold in host memory; a collective of theirs.

    Returns: seconds of its parts: `begin`, `file`, and `finish`, which on a rank that is done early is a wait for the others; those
    of all of it, `write`, and of the processor that this thread has used, `processor`; and the `bytes` that all ranks have written.

    Raises:
        OSError: it could not be made, on any rank, and what there was of it is removed.
    """
    times, used = [time.perf_counter()], time.thread_time()
    sizes = ranks.tell_all(file_size(held))
    partial = ranks.first_does(lambda: target.begin(sum(sizes)))
    times.append(time.perf_counter())
    try:
        mine: list[Record] | str = write_file(partial / store.WEIGHTS, ranks.rank, held)
    except Exception as error:
        mine = _reason(error)
    times.append(time.perf_counter())
    everyone = ranks.tell_first(mine)

    def finish() -> None:
        try:
            if reasons := dict.fromkeys(each for each in everyone if isinstance(each, str)):
                raise OSError(", ".join(reasons))
            target.finish(partial, [record for records in everyone for record in records], held.common)
        except Exception:
            store.give_up(partial)
            raise

    ranks.first_does(finish)
    times.append(time.perf_counter())
    seconds = {name: end - start for name, (start, end) in zip(("begin", "file", "finish"), pairwise(times))}
    return seconds | {"write": times[-1] - times[0], "processor": time.thread_time() - used, "bytes": float(sum(sizes))}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


class BackgroundWrite:
    """One rank's part of a save that is under way.

    Args:
        held: over host memory that nobody changes until this has ended.
        is_copied: waits until the numbers are there.
    """

    def __init__(self, target: Target, held: Holdings, ranks: Ranks, is_copied: Callable[[], None]) -> None:
        self.target = target
        self.seconds: dict[str, float] = {}
        self._work: Callable[[], dict[str, float]] | None = lambda: is_copied() or write(target, held, ranks)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self) -> None:
        """Begins to write, unless it has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            self.seconds = self._work()
        except Exception as error:
            self._error = error
        self._work = None  # it holds on to the snapshot

    def is_written(self) -> bool:
        """Whether every rank has ended; a collective of the main threads."""
        word = torch.tensor([int(not self._thread.is_alive())])
        dist.all_reduce(word, op=dist.ReduceOp.MIN)
        return bool(word)

    def join(self, timeout: float | None = None) -> None:
        """Waits for this rank's part to end, `timeout` seconds at most; at once if it has not begun."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def result(self) -> Path:
        """The whole checkpoint, after `join`.

        Raises:
            StorageError: it could not be written, on any rank, or the run has lost its folder. What was saved before is still there.
        """
        if isinstance(self._error, Displaced):
            raise self._error
        if self._error is not None:
            raise StorageError(
                f"{self.target.final} could not be written: {self._error}; earlier checkpoints are still there. Mend this, then "
                "start the same command again: it goes on from the newest"
            ) from self._error
        return self.target.final

"""Ends a run that hangs, and says which rank is where.

A rank that hangs (a stopped process, a loop, a deadlock, a dead file system) makes all others wait in a collective. Left alone
they fail minutes later, each with the name of a collective and none with the name of the culprit. So every rank has a thread that
looks at `Whereabouts`; a rank that has not moved for `timeout` seconds raises an alarm in the store, and then

    every rank that lives    writes the stacks of its threads to its log, and where it is to the store
    the first to do so       waits for the others' words, prints one message, and all end with exit code HUNG

Whoever says nothing is the culprit, or whoever is not waiting for others. Where a rank waits is read off its stack: nothing has
to be noted before each collective. Collectives' own timeouts are longer than the watchdog's (`distributed.collective_timeout`), so
that this message comes first.

What it costs: a question to the store every 60th of the timeout (10 s at most) from each rank, and a write when the phase
has changed since; a thousand ranks are a few hundred small requests a second at most. The store is in the first node's launcher,
not in rank 0. If it does not answer, each rank tells its own part and ends. Time is counted in looks: a job that
was suspended owes nothing. Long work is no hang as long as it says `moved()`; during rollout, engines that work are movement (and
one that does not is `rollout.hang_timeout`'s). A rank stuck in C code with Python's lock cannot speak, and is named by its silence.
The file system of the logs may be what has died: nobody waits for a write, and the job's log is told before the rank's own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_spice.cluster import verdict
from megatron_spice.cluster.aside import Aside, NoAnswer, answer
from megatron_spice.cluster.exit_codes import HUNG
from megatron_spice.cluster.topology import Topology
from megatron_spice.cluster.verdict import Place
from megatron_spice.cluster.waiting import stands_at, waits_in
from megatron_spice.cluster.whereabouts import HERE, Whereabouts

_ALARM, _TELLER, _TOLD = "watchdog/alarm", "watchdog/teller", "watchdog/told"
_LONGEST_LOOK = 10.0
_PATIENCE = 10.0  # seconds that the store may take to answer, and files to take the last words
_MOMENT = 1.0  # seconds in which files that live take a few lines; others wait for this rank's word meanwhile


class StoreSilent(RuntimeError):
    """The store did not answer in time, or is gone."""


class Watchdog:
    """Watches this rank for the length of the block; made on every rank.

    Args:
        store: shared by all ranks; a connection of its own is made from it.
        timeout: seconds without movement that are a hang.
        host: this node's name.
        log_of: a rank's log.
        mark: adds to this rank's log why it ended.
        tell: says a line in the job's log, and then in this rank's.
    """

    def __init__(
        self, topology: Topology, store: dist.Store, timeout: float, *, host: str, log_of: Callable[[int], Path],
        mark: Callable[[str], None], tell: Callable[[str], None], here: Whereabouts = HERE,
    ) -> None:  # fmt: skip
        self._topology, self._timeout, self._host, self._here = topology, timeout, host, here
        self._log_of, self._mark, self._tell = log_of, mark, tell
        # A connection answers one question at a time, and the run's own may be waiting for an answer.
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=_PATIENCE))
        self._look = min(max(timeout / 60, 0.1), _LONGEST_LOOK)
        self._phase, self._phase_began = here.phase, time.time()
        self._still = 0.0
        self._published: str | None = None
        self._log, self._console = Aside(), Aside()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(self._look + _PATIENCE)

    def _watch(self) -> None:
        moves, looked = -1, time.monotonic()
        while not self._ended.wait(self._look):
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * self._look), now
            phase = self._here.phase
            if phase != self._phase:
                self._phase, self._phase_began = phase, time.time()
            self._still = self._still + passed if moves == self._here.moves else 0.0
            moves = self._here.moves
            try:
                self._publish()
                if self._still > self._timeout:
                    self._ask(lambda: self._store.set(_ALARM, str(self._topology.rank)))
                elif not self._ask(lambda: self._store.check([_ALARM])):
                    continue
                if not self._ended.is_set():
                    self._all_tell()
            except StoreSilent as error:
                if self._still > self._timeout and not self._ended.is_set():
                    self._tell_alone(str(error))

    def _place(self) -> Place:
        main = threading.main_thread().ident
        return Place(
            self._topology.rank, self._host, os.getpid(), self._phase, self._phase_began, time.time(),
            waits_in(main), self._still, stands_at(main),
        )  # fmt: skip

    def _publish(self) -> None:
        """Says once a phase where this rank is, for the day when it no longer can."""
        if self._published != self._phase:
            self._published = self._phase
            words = json.dumps(self._place().record())
            self._ask(lambda: self._store.set(f"watchdog/where/{self._topology.rank}", words))

    # ---- the end ------------------------------------------------------------------------------------------------

    def _all_tell(self) -> None:
        place = self._place()
        self._dump_stacks(place)
        place = place.with_mates(self._states_of_mates())
        mine = json.dumps(place.record())
        tells = self._ask(lambda: self._store.add(_TELLER, 1)) == 1
        if not tells:  # before the others know: the first that ends has the launcher end the rest of its node
            self._log.later(lambda: self._mark(f"ended by the watchdog: {place.words()}"))
        self._log.wait(_MOMENT)
        self._ask(lambda: self._store.set(f"watchdog/report/{self._topology.rank}", mine))
        told = self._verdict() if tells else self._wait_to_be_told()
        if tells:
            self._say(told["words"], f"Hang: {told['words']}")
            self._ask(lambda: self._store.set(_TOLD, json.dumps(told)))
        elif told is None:
            self._say(f"the run hangs; {place.words()}; nobody has told more")
        for record in (told or {}).get("silent", []):
            self._kill_mate(record)
        self._end()

    def _tell_alone(self, why: str) -> None:
        place = self._place()
        self._dump_stacks(place)
        words = f"no progress for {self._still:.0f} s (cluster.timeout): {place.words()}, and {why}"
        self._say(f"{words}; stacks: {self._log_of(self._topology.rank)}", f"ended by the watchdog: {words}")
        self._end()

    def _say(self, words: str, mark: str | None = None) -> None:
        self._console.later(lambda: self._tell(words))
        if mark is not None:
            self._log.later(lambda: self._mark(mark))
        for each in (self._console, self._log):
            each.wait(_MOMENT)

    def _dump_stacks(self, place: Place) -> None:
        """Into memory first: `faulthandler` has Python's lock while it writes, and would stop all threads with its file."""
        with open(os.memfd_create("stacks"), "rb+") as memory:
            faulthandler.dump_traceback(memory, all_threads=True)
            memory.seek(0)
            stacks = memory.read()
        self._log.later(lambda: _write(2, f"watchdog: {place.words()}; stacks of all threads:\n".encode(errors="replace") + stacks))

    def _end(self) -> NoReturn:
        deadline = time.monotonic() + _PATIENCE
        for each in (self._console, self._log):
            each.wait(max(deadline - time.monotonic(), 0.0))
        os._exit(HUNG)

    def _verdict(self) -> dict[str, Any]:
        """Waits until all have told where they are, or had the time to see the alarm and do so."""
        size = self._topology.world_size
        missing, deadline = set(range(size)), time.monotonic() + 3 * self._look + 3.0
        places: dict[int, Place] = {}
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if (record := self._get(f"watchdog/report/{rank}")) is not None:
                    places[rank] = Place.of(record)
            missing -= places.keys()
            time.sleep(min(self._look, 0.5) if missing else 0.0)
        silent = [record for rank in sorted(missing) if (record := self._get(f"watchdog/where/{rank}")) is not None]
        words = verdict.words(places, {record["rank"]: Place.of(record) for record in silent}, size, self._timeout, self._log_of)
        return {"words": words, "silent": silent}

    def _wait_to_be_told(self) -> dict[str, Any] | None:
        deadline = time.monotonic() + 2 * (3 * self._look + 3.0)
        while time.monotonic() < deadline:
            if (told := self._get(_TOLD)) is not None:
                return told
            time.sleep(min(self._look, 0.5))
        return None

    def _states_of_mates(self) -> dict[str, str]:
        """What the kernel says of ranks on this node that do not run or sleep as usual."""
        first = self._topology.node_rank * self._topology.local_world_size
        states = {}
        for rank in range(first, first + self._topology.local_world_size):
            record = self._get(f"watchdog/where/{rank}")
            if record is not None and (state := verdict.unusual_state(record["process"])) is not None:
                states[str(rank)] = state
        return states

    def _kill_mate(self, record: dict[str, Any]) -> None:
        """Ends a silent rank of this node, for which the launcher would wait half a minute in vain."""
        if record["host"] == self._host and verdict.parent_of(record["process"]) == os.getppid():
            with contextlib.suppress(OSError):
                os.kill(record["process"], signal.SIGKILL)

    # ---- the store ----------------------------------------------------------------------------------------------

    def _get(self, key: str) -> dict[str, Any] | None:
        if not self._ask(lambda: self._store.check([key])):
            return None
        return json.loads(self._ask(lambda: self._store.get(key)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """An answer of the store, which may hang."""
        try:
            return answer(question, _PATIENCE)
        except NoAnswer:
            raise StoreSilent(f"the store on the first node does not answer for {_PATIENCE:.0f} s") from None
        except Exception as error:
            raise StoreSilent(f"the store on the first node is gone ({type(error).__name__})") from error


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]

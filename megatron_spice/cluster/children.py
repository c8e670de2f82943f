"""Child processes that never outlive their parent, however it ends.

    parent ends normally        -> `stop` (or atexit): SIGTERM, a grace period, SIGKILL for the whole process group
    parent is killed, crashes   -> the kernel: the child has asked for SIGKILL at its parent's death (PR_SET_PDEATHSIG)

The child itself must ask, first thing, with `die_with_parent`: set from the parent's side the request would be lost at
exec of a privileged file and costs a fork without exec-safety in a threaded parent. If the parent died before the child
asked, no signal ever comes, so the child compares its parent's id with the one it was told.

PR_SET_PDEATHSIG watches the *thread* that started the child. Start children from the main thread, or from one that
lives as long as they should.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PARENT_VARIABLE = "MEGATRON_SPICE_PARENT"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Called by a child: from here on the kernel kills this process (SIGKILL) when `parent` ends.

    `parent` is the expected parent's process id; by default what `Child` put into the environment. Exits at once when
    that process is no longer the parent. Without either (started by hand) nothing happens.
    """
    if parent is None:
        parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if not parent or not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


class Child:
    """A running child in its own session, writing to `log_path` (created readable by its owner only: it may hold keys).

    `environment` is the child's whole environment. `grace` is how many seconds `stop` waits before it kills.
    """

    def __init__(
        self, command: Sequence[str], *, log_path: Path, environment: Mapping[str, str], grace: float = 20.0
    ) -> None:
        self.log_path = log_path
        self._grace = grace
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = _Log(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=self._log.entrance,
                stderr=self._log.entrance,
                env={**environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )
        finally:
            os.close(self._log.entrance)
        self._owner = os.getpid()
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """The child's process id, which is also its process group's."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the child runs; negative: the signal that ended it."""
        return self._process.poll()

    def log_tail(self, lines: int = 20) -> str:
        """The last `lines` lines that it wrote, for error messages."""
        if self._process.poll() is not None:
            self._log.wait(1.0)  # what it said last is still on its way
        return "\n".join(bytes(self._log.tail).decode(errors="replace").splitlines()[-lines:])

    def stop(self, grace: float | None = None) -> None:
        """Ends the child and everything in its process group; returns when they are gone. May be called twice."""
        if os.getpid() != self._owner:  # a forked copy of the parent runs its atexit handlers too
            return
        atexit.unregister(self.stop)
        grace = self._grace if grace is None else grace
        if self._process.poll() is None:
            # Only the leader: its own children must not see the signal before it has told them what to do.
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        # Its children end with it, but one of them (multiprocessing's tracker) first removes what the others left behind.
        self._wait_for_group(2.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._wait_for_group(5.0)
        self._log.wait(5.0)

    def _wait_for_group(self, seconds: float) -> None:
        """Gives what is left of the group at most `seconds` to end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _group_runs(self.pid):
            time.sleep(0.02)


class _Log:
    """Takes what a child writes to `entrance` and appends it to a file, which may refuse.

    A child that wrote to the file itself would end, or hang with its message half said, when the disk is full. So it writes
    into a pipe that is always emptied, and what the file does not take is kept only for the next error message.
    """

    def __init__(self, file: int) -> None:
        self._exit, self.entrance = os.pipe()
        self._file = file
        self.tail = bytearray()
        self._thread = threading.Thread(target=self._copy, name="log of a child", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Returns when all that was written has arrived: the last process with the entrance has ended."""
        self._thread.join(seconds)

    def _copy(self) -> None:
        while text := os.read(self._exit, 65536):
            self.tail += text
            del self.tail[:-65536]
            with contextlib.suppress(OSError):
                os.write(self._file, text)
        os.close(self._exit)
        os.close(self._file)


def _group_runs(group: int) -> bool:
    """Whether a process of `group` exists that is not a zombie."""
    for entry in Path("/proc").iterdir() if Path("/proc/self/stat").exists() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name) state ppid pgrp ...": the name may hold spaces and brackets
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == group and state not in "ZX":
                    return True
    return False

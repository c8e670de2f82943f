"""One log per rank: RUN_DIR/logs/rank_N.log, into which everything goes that a rank says while it trains.

On a job of a thousand ranks nobody can read a thousand ranks' warnings in one file, and nobody can do without them when one
rank has failed. So each rank's standard output and error, library warnings and a crash's stacks included, go to a file of its
own: by file descriptor, so that C and child processes are taken along, and what a killed rank has said is there. What the first
rank prints (not its standard error) goes to the job's log as well, and what any rank says by `tell`.

A run that is requeued or started again goes on in the same files. Lines that begin with MARK say where an attempt begins and
how it ended; `rank_logs.py` reads them. A log that cannot be written never ends a rank: what the disk does not take is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import io
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from megatron_spice.config.errors import ConfigError, StorageError

MARK = "==== "
BEGAN, ENDED, INTERRUPTED, REFUSED, FAILED, KILLED = "began", "ended", "interrupted", "refused", "failed", "killed"
HANG = "Hang: "  # how the reason of a failure begins that the watchdog tells
MAX_REASON = 600  # characters of an error in a mark; all of it stands above


def folder_of(run_dir: Path) -> Path:
    """Where a run's logs are."""
    return Path(run_dir) / "logs"


def path_of(run_dir: Path, rank: int) -> Path:
    """A rank's log."""
    return folder_of(run_dir) / f"rank_{rank}.log"


def host_name() -> str:
    """This node's name, as Slurm knows it if it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def attempt_name() -> str:
    """What all ranks of one start of a run have in common, and no other start has."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job {job} restart {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"launch {os.environ.get('TORCHELASTIC_RUN_ID', 'by hand')}"


def mark(path: Path, how: str, reason: str = "") -> None:
    """Adds a line to a rank's log that says what became of it; on a file system that takes nothing, nothing."""
    with contextlib.suppress(OSError), open(path, "ab") as file:
        file.write(mark_line(how, reason).encode(errors="replace"))


def mark_line(how: str, reason: str = "") -> str:
    """One line with the time in UTC; of a longer reason its beginning."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    words = " ".join(reason.split())
    return f"{MARK}{now} {how} {words[:MAX_REASON]}".rstrip() + "\n"


_console: int | None = None  # the job's log, as long as this process's output goes to its own


def tell(text: str) -> None:
    """Says a line in the job's log and in this rank's. The rank's is second, and both are without Python's streams: a log that
    does not take it blocks for ever whoever writes there, and so does the stream's lock, which a thread may hold that does."""
    if _console is None:
        print(text, flush=True)
        return
    for target in (_console, 1):
        _write(target, f"{text}\n")


def _write(target: int, text: str) -> None:
    """All of it; what the target does not take is lost."""
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]


class RankLog:
    """Sends this process's output to its log for the length of the block.

    An exception that leaves the block is written to the log with its traceback, told to torchrun (whose error file the launcher
    reads), and becomes SystemExit(1). ConfigError and StorageError, which the command line tells, and SystemExit pass as they are.

    Args:
        interrupted_code: exit code of a rank that was asked to end and has saved.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, *, interrupted_code: int) -> None:
        self._interrupted_code, self._is_first = interrupted_code, rank == 0
        self.path = path_of(run_dir, rank)
        self._who = f"rank {rank} of {world_size} on {host_name()}, process {os.getpid()}, {attempt_name()}"
        self._kept: tuple[int, int, object, object] | None = None

    def __enter__(self) -> RankLog:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            print(f"{self._who}: no log of its own: {error}", file=sys.stderr, flush=True)
            return self
        sys.stdout.flush()
        sys.stderr.flush()
        console = os.dup(1)
        self._kept = (console, os.dup(2), sys.stdout, sys.stderr)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout, sys.stderr = _Lines(1, console) if self._is_first else _Lines(1), _Lines(2)
        global _console
        _console = console
        faulthandler.enable(2)
        mark(self.path, BEGAN, self._who)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        how, reason, code = ENDED, "", None
        if isinstance(error, SystemExit):
            code = error.code
            how, reason = (INTERRUPTED, "saved") if code == self._interrupted_code else (ENDED, f"exit code {code}" if code else "")
        elif isinstance(error, ConfigError):
            how, reason = REFUSED, str(error)
        elif isinstance(error, StorageError):
            how, reason = FAILED, str(error)
        elif error is not None:
            traceback.print_exception(kind, error, trace)
            how, reason = FAILED, f"{type(error).__name__}: {error}"
            _tell_torchrun(error)
        self._restore()
        mark(self.path, how, reason)
        if how == FAILED and not isinstance(error, StorageError):
            if self._kept is None:
                return  # nobody has said it anywhere: Python does
            raise SystemExit(1) from None

    def _restore(self) -> None:
        if self._kept is None:
            return
        console, errors, output, error_output = self._kept
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(console, 1)
        os.dup2(errors, 2)
        os.close(console)
        os.close(errors)
        sys.stdout, sys.stderr = output, error_output  # type: ignore[assignment]
        global _console
        _console = None
        faulthandler.enable(2)


def _tell_torchrun(error: BaseException) -> None:
    """Writes the error where torchrun looks for it, as torch.distributed.elastic's `record` does, which wraps functions only."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        stack = "".join(traceback.format_exception(error))
        more = {"py_callstack": stack, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": more}}))


class _Lines(io.TextIOBase):
    """Text that goes to several file descriptors, whole lines at a time; one that takes nothing does no harm."""

    def __init__(self, *targets: int) -> None:
        self._targets = targets
        self._rest = ""
        self._lock = threading.RLock()

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._targets[0]

    def write(self, text: str) -> int:
        with self._lock:
            whole, newline, self._rest = (self._rest + text).rpartition("\n")
            self._send(whole + newline)
        return len(text)

    def flush(self) -> None:
        with self._lock:
            text, self._rest = self._rest, ""
            self._send(text)

    def _send(self, text: str) -> None:
        for target in self._targets if text else ():
            _write(target, text)

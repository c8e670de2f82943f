"""Whose a run's folder is: one start's at a time.

Two starts in one folder would remove what the other is saving and cut off the other's log. So the first rank of a start writes
who it is to `owner.json`, by a rename, and looks there again before it makes a checkpoint's folder, before it gives it its name,
and before each line of a log. Only this is relied on: some shared file systems have no locks, and others keep those of the dead.

    the owner's process lives on this machine                   another start is refused, and told what to do
    it holds `owner.lock`, or Slurm says that its job runs      the same, wherever it is
    it is an earlier start of the same Slurm job                it loses the folder: Slurm takes it for dead, rightly or not
    anything else                                               it is over, and the next start has the folder

Who has lost the folder and lives after all ends at its next look (`Displaced`). Between a look and what follows from it there may
be another start, so no two starts share a folder under `checkpoints` either: see `store.begin`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_spice.config.errors import ConfigError, StorageError, storing
from megatron_spice.telemetry.rank_log import attempt_name, host_name

NAME, LOCK, ENDED = "owner.json", "owner.lock", "owner.ended"
SLURMS_PATIENCE = 150.0  # seconds that a job which is about to end is waited for: it may be saving
_LOCK_TRIES, _LOCK_PAUSE = 10, 0.1  # somebody else may only be looking whether it is held


class Displaced(StorageError):
    """Another start has taken the folder over. `str()` says which."""


@dataclass(frozen=True)
class Owner:
    """One start of a run. `machine` is this boot of its node and its view of process ids, `began` when its process did, by the
    kernel's clock; `job` is empty without Slurm."""

    token: str
    attempt: str
    job: str
    restart: int
    host: str
    process: int
    machine: str
    began: str
    time: float

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(
            uuid.uuid4().hex[:12], attempt_name(), job, restart, host_name(), os.getpid(), _machine(), _began(os.getpid()) or "", time.time()
        )

    def words(self) -> str:
        """Who it is, for a person."""
        return f"{self.attempt} (process {self.process} on {self.host})"

    def follows(self, other: Owner) -> bool:
        """Whether it is a later start of the same Slurm job."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart


class Ownership:
    """A start's hold on its run's folder; as a context manager, for the length of the block. For the first rank.

    Raises:
        ConfigError: the folder is in use.
    """

    def __init__(self, run_dir: Path, mine: Owner | None = None) -> None:
        self.run_dir, self.mine = run_dir, mine or Owner.this()
        with storing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        if (problem := in_use(run_dir, self.mine)) is not None:
            raise ConfigError(problem)
        self._lock = _locked(run_dir, fcntl.LOCK_EX)  # a later look would find it held in vain: by who starts at the same moment
        with storing(run_dir / NAME):
            _write(run_dir / NAME, json.dumps(asdict(self.mine), indent=1), self.mine.token)

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *exception: object) -> None:
        # Not in the owner's own file, which may be another's by now; and then it is that one's end, if it has come, that must stay said.
        with contextlib.suppress(OSError):
            if (found := owner_of(self.run_dir)) is not None and found.token == self.mine.token:
                _write(self.run_dir / ENDED, self.mine.token, self.mine.token)
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raises Displaced if the folder is another start's by now."""
        found = owner_of(self.run_dir)
        if found is not None and found.token != self.mine.token:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.time))
            raise Displaced(
                f"{self.run_dir} belongs to {found.words()} since {since}: this start, {self.mine.attempt} (process {self.mine.process} on "
                f"{self.mine.host}), has lost it and ends. What it had saved is there, and the other goes on from it"
            )


def in_use(run_dir: Path, mine: Owner | None = None) -> str | None:
    """Why this start may not have the folder, with what to do; None if it may."""
    mine = mine or Owner.this()
    owner = owner_of(run_dir)
    if owner is None or _has_ended(run_dir, owner) or mine.follows(owner) or _is_here(owner):
        return None
    if owner.machine == mine.machine:
        how = "is running" if owner.began and _began(owner.process) == owner.began else None
    else:
        how = _by_slurm(owner) if owner.job != mine.job else None
        how = how or ("holds its lock" if _is_locked(run_dir) else None)
    if how is None:
        return None
    end = f"`scancel {owner.job}`" if owner.job else f"`kill {owner.process}` on {owner.host}"
    return (
        f"run.dir={run_dir} is in use: {owner.words()} {how}; wait for it, end it ({end}; it saves), or name another run.dir. If you know "
        f"better, remove {run_dir / NAME} and {run_dir / LOCK}"
    )


def owner_of(run_dir: Path) -> Owner | None:
    """Whose the folder is; None where nobody has said so.

    Raises:
        OSError: the file system does not tell.
    """
    for is_last in (False, True):
        try:
            return Owner(**json.loads((run_dir / NAME).read_text()))
        except FileNotFoundError:
            return None
        except OSError as error:  # on NFS the file that was there may have been replaced just now
            if is_last or error.errno != errno.ESTALE:
                raise
        except (ValueError, TypeError):
            return None
    return None


def _write(path: Path, text: str, token: str) -> None:
    partial = path.with_name(f"{path.name}.{token}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _has_ended(run_dir: Path, owner: Owner) -> bool:
    try:
        return (run_dir / ENDED).read_text() == owner.token
    except OSError:
        return False


def _locked(run_dir: Path, how: int) -> int | None:
    """A descriptor of the lock, None where it cannot be had. It is the process's: its children do not inherit it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for _ in range(_LOCK_TRIES - 1):
                with contextlib.suppress(BlockingIOError, PermissionError):
                    fcntl.lockf(descriptor, how | fcntl.LOCK_NB)
                    return descriptor
                time.sleep(_LOCK_PAUSE)
            fcntl.lockf(descriptor, how | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
            raise
    return None


def _is_locked(run_dir: Path) -> bool:
    """Whether somebody else holds the lock. A file system without locks never says so."""
    with contextlib.suppress(OSError), open(run_dir / LOCK, "rb") as file:
        for is_last in (False, True):
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except (BlockingIOError, PermissionError):
                if not is_last:
                    time.sleep(_LOCK_PAUSE)
        return True
    return False


def _is_here(owner: Owner) -> bool:
    """Whether it is this process, which has begun a run anew."""
    return (owner.machine, owner.process, owner.began) == (_machine(), os.getpid(), _began(os.getpid()))


def _by_slurm(owner: Owner) -> str | None:
    """That its job runs, where Slurm says so; of one that is about to end, when it has."""
    if not owner.job:
        return None
    end = time.monotonic() + SLURMS_PATIENCE
    while (state := _job_state(owner.job)) == "COMPLETING" and time.monotonic() < end:
        time.sleep(2.0)
    return f"is {state}, says Slurm" if state in ("RUNNING", "SUSPENDED", "STOPPED", "COMPLETING") else None


def _job_state(job: str) -> str:
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):  # not here, or its controller is down
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _machine() -> str:
    """What tells apart machines, their boots, and containers that number processes for themselves."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return host_name()


def _began(process: int) -> str | None:
    """When a process of this machine began, in ticks of the kernel; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

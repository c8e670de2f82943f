"""torchrun, with a word in the end that a person can use: `python -m megatron_spice.launch [torchrun's options] ...`.

torchrun's own report of a failure is a page that names an exit code. Here the last lines name the rank, its node, the error
and its log. A rank that was killed could not say so: its log is marked on its behalf. With several nodes each launcher speaks
for its own ranks; who failed first among all, slurm/spice.sh asks of the logs (`telemetry/rank_logs.py`) when the job has ended.

torchrun also gives ranks half a minute to end after SIGTERM or Ctrl-C, and then kills them, which may be in the middle of a save,
and knows nothing of Slurm's warning before the time limit (SIGUSR1), which with proctrack/cgroup reaches a node's launcher alone.
Here a rank takes the time it needs (`AskedToEnd`). Ranks that another rank's failure has left behind have that half minute still.

Exit code: 75 where the ranks were asked to end, and have saved or were not ready yet to hear of it (they end by the signal, as
there is nothing to save), 76 where another process has the port that nodes meet at, otherwise 1; a recipe that a rank refused, which
is said by then, is 1 too: something was started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from megatron_spice.cluster.aside import NoAnswer, answer
from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.cluster.scratch import cache_folders
from megatron_spice.config.errors import EXIT_CODE as REFUSED
from megatron_spice.telemetry import rank_log, rank_logs

RUN_DIR_VARIABLE = "SPICE_RUN_DIR"
FAILED_AT, ENDED_AT = "failed_at", "ended_at"
PORT_TAKEN = 76  # slurm/requeue.sh knows it
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PATIENCE = 30.0  # seconds in which a file system that lives gives the logs


def main(arguments: Sequence[str]) -> int:
    """Runs the ranks of this node to their end, with their caches on this node."""
    code = _run(arguments)
    if code == INTERRUPTED and _is_slurms() and (run_dir := os.environ.get(RUN_DIR_VARIABLE)):
        # Slurm ends the other nodes' launchers then, and slurm/requeue.sh would take them for killed.
        with contextlib.suppress(NoAnswer):
            answer(lambda: _leave_word(Path(run_dir), ENDED_AT), _PATIENCE)
    return code


def _run(arguments: Sequence[str]) -> int:
    os.environ.update(cache_folders(os.environ))
    asked = AskedToEnd(is_slurms=_is_slurms())
    try:
        with asked:
            # Without the option torchrun takes SIGTERM and SIGINT for itself, also where they were ignored.
            run(parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        if not asked.has_ended(error.failures.values()):
            return _failed(error)
        print(f"spice: the ranks on {rank_log.host_name()} were asked to end before there was anything to save", file=sys.stderr)
        return INTERRUPTED
    except SignalException as error:
        print(f"spice: the launcher on {rank_log.host_name()} was ended by {error.sigval.name}, its ranks with it", file=sys.stderr)
        return INTERRUPTED if _is_slurms() and asked.is_asked else 1
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        print(f"spice: the port that nodes were to meet at is taken on {rank_log.host_name()}: {error}", file=sys.stderr)
        return PORT_TAKEN
    return 0


def _is_slurms() -> bool:
    return "SLURM_JOB_ID" in os.environ


class AskedToEnd:
    """For the length of the block, what the launcher does with SIGTERM, Ctrl-C and SIGUSR1, whichever it inherited as ignored.

    The first goes on to the ranks, which are in sessions of their own where a terminal's Ctrl-C does not come, and they are
    waited for. The second ends them at once: of a person, who will not wait. Slurm may send any number, to the launcher alone or
    to the ranks as well, and kills by itself when its KillWait or GraceTime is over: then the second is nothing. With no rank
    started, the first ends the launcher.

    Args:
        is_slurms: whether the launcher is part of a Slurm job.
    """

    _ONE_REQUEST = 0.2  # seconds: `timeout` sends its signal to the process and to its group

    def __init__(self, *, is_slurms: bool) -> None:
        self._is_slurms = is_slurms
        self._asked_at: float | None = None

    @property
    def is_asked(self) -> bool:
        return self._asked_at is not None

    def has_ended(self, failures: Iterable[ProcessFailure]) -> bool:
        """Whether that is why ranks failed: one that has no handler yet ends by the signal, and others may have lost it."""
        return self.is_asked and any(-failure.exitcode in _SIGNALS for failure in failures)

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._asked_at is not None else handler)  # what follows takes no time

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now, ranks = time.monotonic(), psutil.Process().children()
        name = signal.Signals(number).name
        if self._asked_at is None:
            self._asked_at = now
            if not ranks:
                raise SignalException(f"asked to end by {name} before any rank was started", signal.Signals(number))
            if not self._is_slurms:
                _say(f"asked to end by {name}: the ranks save, for as long as it takes; a second signal ends them at once, unsaved")
            _send(ranks, number)
        elif not self._is_slurms and now - self._asked_at > self._ONE_REQUEST:
            _send(ranks, signal.SIGKILL)
            raise SignalException(f"asked to end by {name} for the second time", signal.Signals(number))


def _send(ranks: Sequence[psutil.Process], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)  # to it alone: it has to tell its own children what to do


def _say(text: str) -> None:
    """Also from a signal handler that has interrupted a `print`."""
    with contextlib.suppress(OSError):
        os.write(2, f"spice: {text}\n".encode())


def _failed(error: ChildFailedError) -> int:
    """Says what became of the ranks that failed by themselves; returns the exit code."""
    # Ranks that torchrun itself has ended meanwhile are among them.
    failures = {rank: each for rank, each in error.failures.items() if each.exitcode != -signal.SIGTERM} or error.failures
    codes = {failure.exitcode for failure in failures.values()}
    if codes == {INTERRUPTED}:
        return INTERRUPTED
    logs = _logs(failures)
    cause = rank_logs.first_cause([log for log in logs if log.rank in failures])
    if codes == {REFUSED}:
        return 1
    rank = cause.rank if cause is not None else min(failures, key=lambda rank: failures[rank].timestamp)
    failure = failures[rank]
    print(f"spice: rank {rank} on {rank_log.host_name()} (process {failure.pid}) {_story(failure)}", file=sys.stderr)
    if not _is_slurms() and cause is not None:
        print(f"spice: {rank_logs.told(logs)}", file=sys.stderr)
    return 1


def _logs(failures: Mapping[int, ProcessFailure]) -> list[rank_logs.RankLog]:
    """How the run's ranks ended, with the word that killed ones could not add; none where their file system gives none. Under Slurm
    only of these: a thousand ranks' launchers would all read a thousand logs."""
    if not (run_dir := os.environ.get(RUN_DIR_VARIABLE)):
        return []

    def marked() -> list[rank_logs.RankLog]:
        for rank, failure in failures.items():
            if failure.exitcode < 0:
                rank_log.mark(rank_log.path_of(Path(run_dir), rank), rank_log.KILLED, f"by {_signal(failure)}")
        if not _is_slurms():
            return rank_logs.read_ends(Path(run_dir))
        logs = rank_logs.read_ends(Path(run_dir), failures, attempt=rank_log.attempt_name())
        _note(Path(run_dir), rank_logs.first_cause(logs))
        return logs

    try:
        return answer(marked, _PATIENCE)
    except NoAnswer:
        print(f"spice: {rank_log.folder_of(Path(run_dir))} gave no log for {_PATIENCE:.0f} s: is its file system dead?", file=sys.stderr)
    except OSError as error:
        print(f"spice: {rank_log.folder_of(Path(run_dir))} gave no log: {error}", file=sys.stderr)
    return []


def _note(run_dir: Path, cause: rank_logs.RankLog | None) -> None:
    """Leaves word for slurm/requeue.sh that ranks of this start have failed, unless they only lost others."""
    if cause is None or not (cause.is_echo or cause.reason.startswith(rank_log.HANG)):
        _leave_word(run_dir, FAILED_AT)


def _leave_word(run_dir: Path, name: str) -> None:
    """On a file system that takes nothing, none."""
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(f"{rank_log.attempt_name()}\n", encoding="utf-8")


def _signal(failure: ProcessFailure) -> str:
    return signal.Signals(-failure.exitcode).name


def _story(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {_signal(failure)}"
    if isinstance(failure.message, dict):
        return f"failed:\n{failure.message.get('message', '').rstrip()}"
    return f"ended with exit code {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the ranks' logs of a run say: which there are, how each rank's last attempt ended, and who failed first.

    python -m megatron_spice.telemetry.rank_logs RUN_DIR        # the first cause of the newest attempt's failure

A rank that fails takes the others along: within milliseconds they lose their connections, with messages that are longer than
the one that matters. The first cause is the earliest failure that is not such an echo; clocks of nodes may differ by more than
echoes take, so what a failure says counts before when it was. A rank that was killed says nothing: its launcher marks its log.
When a job fails, only the ends of its logs are read (`read_ends`): there may be thousands, each as long as the run.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_spice.telemetry import rank_log

LOST = "lost"
RUNNING = "running"
TAIL_LINES = 12
SHOWN = 16
ENDS = (2**16, 2**22)
"""Bytes of a log's end in which the last attempt is looked for; usually it is in the first. If it has written more than the last, all
of the log is read."""

_MARK = re.compile(rf"{re.escape(rank_log.MARK)}(\S+) ({rank_log.BEGAN}|{rank_log.ENDED}|{rank_log.INTERRUPTED}|"
                   rf"{rank_log.REFUSED}|{rank_log.FAILED}|{rank_log.KILLED})(?: (.*))?$")  # fmt: skip
_BEGAN = re.compile(r"rank \d+ of (\d+) on (\S+), process (\d+), (.*)")
# How a rank's failure reads that only lost another: gloo's, NCCL's and the store's words, and the watchdog's.
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|closed by peer|socket|gloo|nccl|dist(network|backend|store)error|"
    r"timed out|waited \d+ s for other ranks|sign of life|remote peer|SIGTERM|ended by the watchdog",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankLog:
    """A rank's log and the last attempt in it. `state` is how it ended (`rank_log`'s words), "running" or "lost": another rank's
    attempt has ended, this one's has not. `reason` is one line, `tail` the last lines before a failure."""

    rank: int
    path: Path
    attempts: int = 0
    attempt: str = ""
    host: str = "?"
    process: int = 0
    world_size: int = 0
    began: str = ""
    state: str = RUNNING
    when: str = ""
    reason: str = ""
    tail: Sequence[str] = field(default=(), repr=False)

    @property
    def has_failed(self) -> bool:
        return self.state in (rank_log.FAILED, rank_log.KILLED)

    @property
    def is_echo(self) -> bool:
        """Whether it failed only because another rank did."""
        told_first = self.state == rank_log.KILLED or self.reason.startswith(rank_log.HANG)
        return self.has_failed and not told_first and _ECHO.search(self.reason) is not None

    def words(self) -> str:
        """How it ended, for a person."""
        what = {rank_log.FAILED: self.reason, rank_log.KILLED: f"killed {self.reason}", LOST: "ended without a word"}
        return what.get(self.state, f"{self.state} {self.reason}".rstrip())


def read(run_dir: Path) -> list[RankLog]:
    """The logs of a run's newest attempt, by rank; [] where there are none. Logs of ranks that it does not have (an earlier
    attempt had more) are left out."""
    return _of_one_attempt([_read(path) for path in _paths(run_dir)])


def read_ends(run_dir: Path, ranks: Iterable[int] | None = None, *, attempt: str | None = None) -> list[RankLog]:
    """The same from the ends of the logs, of these ranks (None: all) and of this attempt (None: the newest). `attempts` counts only
    those that were read."""
    paths = _paths(run_dir) if ranks is None else [rank_log.path_of(run_dir, rank) for rank in ranks]
    return _of_one_attempt([_read_end(path) for path in paths if path.exists()], attempt)


def _paths(run_dir: Path) -> list[Path]:
    return [path for path in rank_log.folder_of(run_dir).glob("rank_*.log") if path.stem[5:].isdigit()]


def _of_one_attempt(found: Sequence[RankLog], attempt: str | None = None) -> list[RankLog]:
    """Those of this attempt (None: the newest) by rank."""
    found = [log for log in found if log.attempts]
    if not found:
        return []
    attempt = attempt or max(found, key=lambda log: log.began).attempt
    current = sorted((log for log in found if log.attempt == attempt), key=lambda log: log.rank)
    if any(log.state != RUNNING for log in current):
        current = [_replace_state(log) for log in current]
    return current


def first_cause(logs: Sequence[RankLog]) -> RankLog | None:
    """The failure that the others followed, None where no rank has failed."""
    failed = [log for log in logs if log.has_failed]
    return min(failed, key=lambda log: (log.is_echo, log.when), default=None)


def told(logs: Sequence[RankLog]) -> str:
    """One line about the first cause and one about ranks that left no word, "" where no rank has failed."""
    cause = first_cause(logs)
    lost = [log for log in logs if log.state == LOST]
    lines = []
    if cause is not None and cause.is_echo and lost:
        lines.append(
            f"first cause: not told by itself; {_names(lost)} ended without a word, then rank {cause.rank} on {cause.host}: "
            f"{cause.words()}; its log: {cause.path}"
        )
    elif cause is not None:
        lines.append(
            f"first cause: rank {cause.rank} on {cause.host} (process {cause.process}), {cause.when}: {cause.words()}; "
            f"its log: {cause.path}"
        )
    return "\n".join(lines)


def listed(logs: Sequence[RankLog]) -> str:
    """Where the logs are, ranks that did not end well one by one (the first SHOWN), and the last lines of the one that failed first."""
    if not logs:
        return ""
    ended: dict[str, int] = {}
    for log in logs:
        ended[log.state] = ended.get(log.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in ended.items())
    lines = [f"{len(logs)} rank logs in {logs[0].path.parent}, attempt {max(log.attempts for log in logs)} ({logs[0].attempt}): {states}"]
    odd = [log for log in logs if log.has_failed or log.state == LOST]
    lines += [f"  rank {log.rank} on {log.host}: {log.words()}" for log in odd[:SHOWN]]
    if len(odd) > SHOWN:
        lines.append(f"  and {len(odd) - SHOWN} more")
    if (cause := first_cause(logs)) is not None:
        lines += [told(logs), *(f"  | {line}" for line in cause.tail)]
    return "\n".join(lines)


def _names(logs: Sequence[RankLog]) -> str:
    words = [f"rank {log.rank} on {log.host}" for log in logs[:8]]
    return ", ".join(words) + (f" and {len(logs) - 8} more" if len(logs) > 8 else "")


def _replace_state(log: RankLog) -> RankLog:
    return RankLog(**{**log.__dict__, "state": LOST}) if log.state == RUNNING else log


def _read_end(path: Path) -> RankLog:
    with open(path, "rb") as file:
        if not file.seekable():  # a pipe, which somebody may have put in its place
            return _parsed(path, file)
        length = file.seek(0, os.SEEK_END)
        for size in ENDS:
            file.seek(max(0, length - size))
            log = _parsed(path, io.BytesIO(file.read(size)))
            if log.attempts or size >= length:
                return log
    return _read(path)


def _read(path: Path) -> RankLog:
    with open(path, "rb") as file:
        return _parsed(path, file)


def _parsed(path: Path, lines: Iterable[bytes]) -> RankLog:
    """Line by line, since a log may be long; only its end is kept."""
    attempts, last, end, tail = 0, None, None, []
    for line in lines:
        if not line.startswith(rank_log.MARK.encode()):
            tail = [*tail[-TAIL_LINES + 1 :], line] if end is None else tail
            continue
        found = _MARK.match(line.decode(errors="replace").rstrip("\n"))
        if found is None:
            continue
        if found[2] == rank_log.BEGAN:
            attempts, last, end, tail = attempts + 1, found, None, []
        elif end is None:  # what comes after is its end as others see it
            end = found
    log = RankLog(int(path.stem[5:]), path)
    told = _BEGAN.match(last[3] or "") if last is not None else None
    if last is None or told is None:
        return log
    ended = {"state": end[2], "when": end[1], "reason": end[3] or ""} if end is not None else {}
    lines = [line.decode(errors="replace").rstrip("\n")[:400] for line in tail]
    return RankLog(
        log.rank, path, attempts, told[4], told[2], int(told[3]), int(told[1]), last[1], tail=lines, **ended
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Prints the first cause, if there is one: of this start in a Slurm job, otherwise of the newest."""
    if len(arguments) != 1:
        print("usage: python -m megatron_spice.telemetry.rank_logs RUN_DIR", file=sys.stderr)
        return 2
    attempt = rank_log.attempt_name() if "SLURM_JOB_ID" in os.environ else None
    if text := told(read_ends(Path(arguments[0]), attempt=attempt)):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

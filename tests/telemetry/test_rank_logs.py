"""One log per rank, and what is read from all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_spice.telemetry import rank_log, rank_logs

ROOT = Path(__file__).resolve().parents[2]
RANK = '''
import contextlib, os, signal, sys
from pathlib import Path
from megatron_spice.config.errors import ConfigError
from megatron_spice.telemetry.rank_log import RankLog, tell
with RankLog(Path(sys.argv[1]), int(os.environ.get("RANK", "1")), 2, interrupted_code=75):
    print("progress")
    tell("to all")
    print("a warning", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.write(2, b"from C\\n")
    os.system("echo from a child")
    %s
print("after")
'''


def run_rank(run_dir: Path, last: str, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    environment = {**clean, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-c", RANK % last, str(run_dir)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_what_a_rank_says_is_in_its_log_and_what_the_first_prints_in_the_jobs_too(tmp_path):
    for rank, printed in (("0", "progress\nto all\nafter\n"), ("1", "to all\nafter\n")):
        done = run_rank(tmp_path, "pass", RANK=rank)
        assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")
        began, *said, ended = rank_log.path_of(tmp_path, int(rank)).read_text().splitlines()
        assert said == ["progress", "to all", "a warning", "from C", "from a child"]
        assert f" began rank {rank} of 2 on " in began and ended.endswith(" ended")


@pytest.mark.parametrize(
    ("last", "code", "state", "reason"),
    [
        ("raise ValueError('bad\\nnews')", 1, rank_log.FAILED, "ValueError: bad news"),
        ("raise SystemExit(75)", 75, rank_log.INTERRUPTED, "saved"),
        ("raise SystemExit(3)", 3, rank_log.ENDED, "exit code 3"),
        ("raise ConfigError('train.seed=x')", 1, rank_log.REFUSED, "1 problem: - train.seed=x"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, rank_logs.RUNNING, ""),
    ],
)
def test_how_an_attempt_ended_is_marked(tmp_path, last, code, state, reason):
    done = run_rank(tmp_path, last, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", SLURMD_NODENAME="n2")
    assert done.returncode == code
    [log] = rank_logs.read(tmp_path)
    assert (log.rank, log.host, log.attempt, log.world_size, log.attempts) == (1, "n2", "job 7 restart 2", 2, 1)
    assert (log.state, log.reason) == (state, reason)
    assert ("Traceback" in log.path.read_text()) == (state == rank_log.FAILED)
    assert ("Traceback" in done.stderr) == (state == rank_log.REFUSED), "what a rank refuses, its caller says"


def test_a_crash_leaves_its_stacks_and_attempts_follow_each_other(tmp_path):
    run_rank(tmp_path, "os.abort()")
    assert "Fatal Python error: Aborted" in rank_log.path_of(tmp_path, 1).read_text()
    run_rank(tmp_path, "pass")
    [log] = rank_logs.read(tmp_path)
    assert (log.attempts, log.state) == (2, rank_log.ENDED)


def test_a_log_that_cannot_be_written_ends_no_rank(tmp_path):
    """A full disk, and a run folder that cannot be made."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.log").symlink_to("/dev/full")
    full = run_rank(tmp_path, "pass")
    assert full.returncode == 0 and full.stdout == "to all\nafter\n"
    (tmp_path / "file").touch()
    none = run_rank(tmp_path / "file", "raise ValueError('bad news')")
    assert none.returncode == 1 and "no log of its own" in none.stderr and "ValueError: bad news" in none.stderr


def write(run_dir: Path, rank: int, *lines: str, attempt: str = "job 1 restart 0", at: int = 0) -> None:
    """An attempt whose lines that begin with a second of the day are marks."""
    path = rank_log.path_of(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"==== 2026-01-01T00:00:{at:02}.000+00:00 began rank {rank} of 4 on n{rank // 2 + 1}, process {100 + rank}, {attempt}\n")
        for line in lines:
            file.write(f"==== 2026-01-01T00:00:{line}\n" if line[:2].isdigit() else f"{line}\n")


def test_the_first_cause_is_not_an_echo_whatever_the_clocks_say(tmp_path):
    write(tmp_path, 0, "30.000+00:00 failed RuntimeError: [gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    write(tmp_path, 1, "29.000+00:00 failed EngineError: waited 3 s for other ranks (x): socket closed")
    write(tmp_path, 2, "Traceback", "  that line", "31.000+00:00 failed ValueError: no such token", "32.0+00:00 killed by SIGKILL")
    write(tmp_path, 3)
    logs = rank_logs.read(tmp_path)
    assert [log.state for log in logs] == ["failed", "failed", "failed", "lost"]
    assert rank_logs.first_cause(logs).rank == 2
    assert rank_logs.told(logs) == (
        f"first cause: rank 2 on n2 (process 102), 2026-01-01T00:00:31.000+00:00: ValueError: no such token; its log: {logs[2].path}"
    )
    listed = rank_logs.listed(logs)
    assert "4 rank logs in" in listed and "3 failed, 1 lost" in listed and "rank 3 on n2: ended without a word" in listed and "  |   that line" in listed


def test_a_rank_that_was_killed_comes_before_those_that_lost_it(tmp_path):
    write(tmp_path, 0, "29.000+00:00 failed RuntimeError: Connection reset by peer")
    write(tmp_path, 1, "30.000+00:00 killed by SIGKILL")
    assert "rank 1 on n1 (process 101)" in rank_logs.told(rank_logs.read(tmp_path))


def test_ranks_of_a_lost_node_are_named_where_only_echoes_are_left(tmp_path):
    write(tmp_path, 0, "29.000+00:00 failed RuntimeError: Connection reset by peer")
    for rank in (2, 3):
        write(tmp_path, rank)
    assert "rank 2 on n2, rank 3 on n2 ended without a word, then rank 0 on n1" in rank_logs.told(rank_logs.read(tmp_path))


def test_only_the_newest_attempt_counts(tmp_path):
    for rank in range(4):
        write(tmp_path, rank, "01.000+00:00 failed ValueError: long ago")
    for rank in (0, 1):
        write(tmp_path, rank, "==== not a mark", "\udcff".encode("utf-8", "replace").decode(), attempt="job 1 restart 1", at=5)
    logs = rank_logs.read(tmp_path)
    assert [(log.rank, log.attempts, log.state) for log in logs] == [(0, 2, "running"), (1, 2, "running")]
    assert rank_logs.told(logs) == "" and rank_logs.read(tmp_path / "nowhere") == []


@pytest.mark.parametrize("length", [0, 400, 3000])
def test_an_end_says_how_its_attempt_ended_however_much_was_written(tmp_path, monkeypatch, length):
    """Less than is looked at first, less than is looked at next, and more."""
    monkeypatch.setattr(rank_logs, "ENDS", (240, 700))
    for attempt in range(2):
        for rank in range(3):
            lines = ["progress\r 10 %\r 20 %", "x" * length, f"{20 + attempt}.000+00:00 failed ValueError: {attempt} of {rank}"]
            write(tmp_path, rank, *lines, attempt=f"job 1 restart {attempt}", at=10 + attempt)
    whole, ends = rank_logs.read(tmp_path), rank_logs.read_ends(tmp_path)
    assert [log.attempts for log in whole] == [2] * 3
    assert [log.attempts for log in ends] == [1 if length < 1000 else 2] * 3
    assert [(log.rank, log.reason, log.host, log.attempt, log.tail) for log in ends] == [
        (log.rank, log.reason, log.host, log.attempt, log.tail) for log in whole
    ]
    assert [log.rank for log in rank_logs.read_ends(tmp_path, [2, 5])] == [2]
    assert rank_logs.read_ends(tmp_path, attempt="job 1 restart 2") == [], "it has not begun"


def test_the_report_finds_the_logs_of_a_run_that_failed_before_its_first_iteration(tmp_path):
    write(tmp_path, 0, "what led to it", "29.000+00:00 failed ValueError: no such token")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "metrics.jsonl" in done.stderr
    assert "1 rank logs in" in done.stdout and "ValueError: no such token" in done.stdout and "| what led to it" in done.stdout

"""A run that hangs is ended with a message that names the culprit: real ranks under the real launcher, real collectives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_spice.cluster import verdict
from megatron_spice.cluster.exit_codes import HUNG
from megatron_spice.cluster.verdict import Place
from megatron_spice.telemetry import rank_log, rank_logs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(120)


def run(how: str, run_dir: Path, ranks: int = 3) -> tuple[subprocess.CompletedProcess[str], float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"PYTHONPATH": str(ROOT), "SPICE_RUN_DIR": str(run_dir), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = "import sys; from megatron_spice import launch; launch._PATIENCE = 2.0; sys.exit(launch.main(sys.argv[1:]))"
    command = [sys.executable, "-c", launcher, "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).with_name("hang_on_ranks.py")), how, str(run_dir)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    return done, time.monotonic() - began


def test_a_rank_that_sleeps_is_named_with_its_place_and_its_stacks(tmp_path):
    done, _ = run("sleep", tmp_path)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("the run hangs")]
    assert len(told) == 1, done.stdout
    assert "rank 1 (node0) has been in train for" in told[0] and "hang_on_ranks.py:" in told[0] and "in ask_for_ever" in told[0]
    assert "ranks 0, 2 wait in all_reduce of train" in told[0] and f"stacks: {rank_log.path_of(tmp_path, 1)}" in told[0]
    for rank, function in ((0, "all_reduce"), (1, "ask_for_ever"), (2, "all_reduce")):
        stacks = rank_log.path_of(tmp_path, rank).read_text().partition("stacks of all threads:")[2]
        assert f"in {function}" in stacks, stacks
    assert "first cause: " in done.stderr.splitlines()[-1] and "Hang: the run hangs" in done.stderr.splitlines()[-1]
    assert not any(log.state == rank_logs.LOST for log in rank_logs.read(tmp_path))


def test_a_stopped_first_rank_is_named_by_its_silence_and_ended(tmp_path):
    """It could have been frozen by the kernel or by a debugger; the store is not in it. torchrun alone would wait 30 s for it.
    Before, all were busy for longer than the timeout, with signs of life, and were left alone."""
    done, seconds = run("stop", tmp_path, ranks=2)
    [told] = [line for line in done.stdout.splitlines() if line.startswith("the run hangs")]
    assert done.returncode == 1 and seconds < 30, done.stderr
    assert "rank 0 (node0) gives no sign of life: it has been in train for" in told and ", stopped)" in told
    assert "rank 1 waits in all_reduce of train" in told and "the silent ones have none" in told
    assert "Hang: the run hangs" in done.stderr.splitlines()[-1], "and not that it was killed then"


def test_a_log_that_takes_nothing_does_not_keep_the_run_from_its_end(tmp_path):
    """One rank is in a `print` to it, with the stream's lock; the other has to tell, and cannot write to its own either."""
    rank_log.folder_of(tmp_path).mkdir()
    pipes = []
    for rank in (0, 1):
        os.mkfifo(rank_log.path_of(tmp_path, rank))
        pipes.append(os.open(rank_log.path_of(tmp_path, rank), os.O_RDWR))  # never read
    try:
        done, seconds = run("dead log", tmp_path, ranks=2)
    finally:
        for pipe in pipes:
            os.close(pipe)
    [told] = [line for line in done.stdout.splitlines() if line.startswith("the run hangs")]
    assert "rank 1 (node0) has been in train for" in told and "rank_log.py:" in told and "rank 0 waits in all_reduce of train" in told
    assert done.returncode == 1 and seconds < 40, done.stderr
    assert f"ended with exit code {HUNG}" in done.stderr and "gave no log for 2 s" in done.stderr


def place(rank: int, waits: str | None, phase: str = "train") -> Place:
    return Place(rank, f"n{rank // 2}", 100 + rank, phase, 0.0, 610.0, waits, 60.0, "a.py:1 in f")


def test_the_message_where_all_wait_but_for_different_things():
    places = {rank: place(rank, "all_reduce") for rank in (0, 1, 2)} | {3: place(3, "barrier", "save")}
    words = verdict.words(places, {}, 4, 60.0, lambda rank: Path(f"logs/rank_{rank}.log"))
    assert "ranks 0-2 wait in all_reduce of train; rank 3 waits in barrier of save; stacks: logs/rank_0.log" in words


def test_the_message_stays_short_where_a_thousand_ranks_are_stuck():
    places = {rank: place(rank, None) for rank in range(512)}
    words = verdict.words(places, {600: place(600, None)}, 1024, 60.0, lambda rank: Path(f"logs/rank_{rank}.log"))
    assert len(words) < 2500 and "rank 512 gives no sign of life and never did" in words and "1008 more do not wait either" in words

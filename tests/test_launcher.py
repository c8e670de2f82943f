"""The launcher, asked to end: ranks have the time they need to save, though torchrun's own patience is shorter. And what it leaves
behind when its ranks have failed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_spice import launch
from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.telemetry import rank_log

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1  # torchrun's, in seconds; 30 by default
RANK = f"""
import os, pathlib, signal, sys, time
folder, asked = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
def note(what):
    partial = folder / f"{{what}}{{os.environ['RANK']}}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(partial.with_suffix(""))
note("began")
while not asked:
    time.sleep(0.05)
note("asked")
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    time.sleep(0.05)
note("saved")
sys.exit({INTERRUPTED})
"""
PATIENT = "import sys; from megatron_spice import launch; launch.AskedToEnd._ONE_REQUEST = {}; sys.exit(launch.main(sys.argv[1:]))"


class Launched:
    """Two ranks under the launcher, that take `seconds` to save; None: ranks that are still starting and know of no signal. With
    `one_request`, signals within so many seconds are one."""

    def __init__(self, folder: Path, seconds: float | None, one_request: float | None = None, **more: str) -> None:
        self._folder = folder
        (folder / "rank.py").write_text(RANK if seconds is not None else RANK.replace("SIGUSR1):", "SIGUSR1)[:0]:"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SPICE"))}
        module = ["-m", "megatron_spice.launch"] if one_request is None else ["-c", PATIENT.format(one_request)]
        command = [sys.executable, *module, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        command += [f"--shutdown-timeout={PATIENCE}", str(folder / "rank.py"), str(folder), str(seconds)]
        if "SLURM_JOB_ID" in more:  # as slurm/spice.sh starts it
            command = ["bash", "-c", 'trap "" TERM USR1; exec "$@"', "--", *command]
        self.process = subprocess.Popen(
            command, env=environment | {"PYTHONPATH": str(ROOT)} | more, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def sleep_until_both(self, what: str) -> list[int]:
        """Returns their process ids."""
        deadline = time.monotonic() + 60
        notes = [self._folder / f"{what}{rank}" for rank in (0, 1)]
        while not all(note.exists() for note in notes):
            if self.process.poll() is not None or time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(f"not both ranks have {what}: {self.process.communicate()[1]}")
            time.sleep(0.05)
        return [int(note.read_text()) for note in notes]

    def saved(self) -> int:
        return len(list(self._folder.glob("saved?")))


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[type[Launched]]:
    made: list[Launched] = []

    def make(seconds: float | None, **more: object) -> Launched:
        made.append(Launched(tmp_path, seconds, **more))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.communicate()


def test_what_a_terminals_ctrl_c_starts_is_waited_for(launched):
    job = launched(3.0 * PATIENCE)
    job.sleep_until_both("began")
    os.killpg(job.process.pid, signal.SIGINT)
    said = job.process.communicate(timeout=30)[1]
    assert (job.process.returncode, job.saved()) == (INTERRUPTED, 2), said
    assert "spice: asked to end by SIGINT: the ranks save" in said and "Traceback" not in said


def test_slurm_may_ask_any_number_of_times(launched):
    job = launched(3.0 * PATIENCE, SLURM_JOB_ID="1")
    job.sleep_until_both("began")
    for _ in range(3):
        job.process.send_signal(signal.SIGTERM)
        job.sleep_until_both("asked")
        time.sleep(0.3)
    said = job.process.communicate(timeout=30)[1]
    assert (job.process.returncode, job.saved()) == (INTERRUPTED, 2), said


def test_the_warning_before_the_time_limit_may_come_to_the_launcher_alone_or_to_the_ranks_as_well(launched):
    """With proctrack/cgroup Slurm signals only what it has started itself, with proctrack/linuxproc every process."""
    job = launched(3.0 * PATIENCE, SLURM_JOB_ID="1")
    ranks = job.sleep_until_both("began")
    job.process.send_signal(signal.SIGUSR1)
    job.sleep_until_both("asked")
    for rank in ranks:
        os.kill(rank, signal.SIGUSR1)
    job.process.send_signal(signal.SIGTERM)  # at the limit
    said = job.process.communicate(timeout=30)[1]
    assert (job.process.returncode, job.saved()) == (INTERRUPTED, 2), said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_that_are_still_starting_have_nothing_to_lose(launched, number):
    """That is no failure of theirs: the job is to be started again."""
    job = launched(None, SLURM_JOB_ID="1")
    job.sleep_until_both("began")
    job.process.send_signal(number)
    said = job.process.communicate(timeout=30)[1]
    assert job.process.returncode == INTERRUPTED and "were asked to end before there was anything to save" in said, said


def test_word_is_left_of_an_orderly_end(launched, tmp_path):
    """For the job's script, which hears only of the other nodes' launchers, that Slurm has killed."""
    job = launched(0.0, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", SPICE_RUN_DIR=str(tmp_path / "run"))
    job.sleep_until_both("began")
    job.process.send_signal(signal.SIGTERM)
    said = job.process.communicate(timeout=30)[1]
    assert job.process.returncode == INTERRUPTED and (tmp_path / "run" / "ended_at").read_text() == "job 7 restart 2\n", said


def test_a_second_signal_ends_the_ranks_at_once_but_not_a_double_one(launched):
    """`timeout` sends to the process and to its group."""
    job = launched(600.0, one_request=5.0)  # a busy machine may stall between the two
    ranks = job.sleep_until_both("began")
    job.process.send_signal(signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)
    job.sleep_until_both("asked")
    time.sleep(6.0 * PATIENCE)
    assert job.process.poll() is None and all(map(psutil.pid_exists, ranks)), "that was one request"
    job.process.send_signal(signal.SIGTERM)
    said = job.process.communicate(timeout=20)[1]
    assert (job.process.returncode, job.saved()) == (1, 0) and not any(map(psutil.pid_exists, ranks)), said
    assert said.splitlines()[-1].endswith("was ended by SIGTERM, its ranks with it")


def test_a_port_that_another_process_has_is_told_by_the_exit_code():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = ["--master-addr=127.0.0.1", f"--master-port={taken.getsockname()[1]}"]
        command = [sys.executable, "-m", "megatron_spice.launch", "--nnodes=1", "--nproc-per-node=1", *where, "--module", "nothing"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == launch.PORT_TAKEN and "the port that nodes were to meet at is taken on" in done.stderr, done.stderr


NODE = {0: "failed RuntimeError: Connection closed by peer", 1: "failed RuntimeError: gloo: timed out"}


@pytest.mark.parametrize("ends, noted", [
    (NODE, False),
    (NODE | {1: "failed Hang: the run hangs: rank 2 (n2) gives no sign of life"}, False),
    (NODE | {1: "failed ValueError: no such token"}, True),
    (NODE | {1: "killed by SIGKILL"}, True),
    ({}, True),
])  # fmt: skip
def test_word_is_left_of_ranks_that_failed_by_themselves(tmp_path, monkeypatch, ends, noted):
    """slurm/requeue.sh would take another node's launcher, which Slurm ends then, for one that was killed from outside. And no log
    is read but those of this node's ranks: the other is one that would never give an answer."""
    began = "==== 2026-01-01T00:00:00.000+00:00 began rank {} of 3 on n1, process 7, job 7 restart {}\n"
    rank_log.folder_of(tmp_path).mkdir()
    for rank in NODE:
        text = began.format(rank, 1) + "==== 2026-01-01T00:00:01.000+00:00 failed gloo: the last start's\n"
        if rank in ends:
            text += began.format(rank, 2) + f"==== 2026-01-01T00:00:02.000+00:00 {ends[rank]}\n"
        rank_log.path_of(tmp_path, rank).write_text(text)
    os.mkfifo(rank_log.path_of(tmp_path, 2))
    failures = {rank: ProcessFailure(rank, 7, 1, "<N/A>") for rank in NODE}

    def fails(options: object) -> None:
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(launch, "run", fails)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", launch.RUN_DIR_VARIABLE: str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    began_at = time.monotonic()
    assert launch.main(["train"]) == 1 and time.monotonic() - began_at < 20
    note = tmp_path / launch.FAILED_AT
    assert note.exists() == noted and (not noted or note.read_text() == "job 7 restart 2\n")

"""The launcher, asked to end: ranks have the time they need to save, though torchrun's own patience is shorter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_spice.cluster.exit_codes import INTERRUPTED

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


class Launched:
    """Two ranks under the launcher, that take `seconds` to save."""

    def __init__(self, folder: Path, seconds: float, **more: str) -> None:
        self._folder = folder
        (folder / "rank.py").write_text(RANK)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SPICE"))}
        command = [sys.executable, "-m", "megatron_spice.launch", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
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

    def make(seconds: float, **more: str) -> Launched:
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


def test_a_second_signal_ends_the_ranks_at_once_but_not_a_double_one(launched):
    """`timeout` sends to the process and to its group."""
    job = launched(600.0)
    ranks = job.sleep_until_both("began")
    job.process.send_signal(signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)
    job.sleep_until_both("asked")
    time.sleep(2.0 * PATIENCE)
    assert job.process.poll() is None and all(map(psutil.pid_exists, ranks)), "that was one request"
    job.process.send_signal(signal.SIGTERM)
    said = job.process.communicate(timeout=20)[1]
    assert (job.process.returncode, job.saved()) == (1, 0) and not any(map(psutil.pid_exists, ranks)), said
    assert said.splitlines()[-1].endswith("was ended by SIGTERM, its ranks with it")

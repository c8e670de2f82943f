from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_spice.rollout.pulse import Pulse, scheduler_ids, scheduler_ticks

BUSY = "import time\nwhile True: sum(range(10000)); time.sleep(0.001)"


@pytest.fixture
def worker() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def looks(pulse: Pulse, seconds: float, has_work: bool = True) -> list[bool]:
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        found.append(pulse.is_hung(has_work))
    return found


def test_a_process_that_works_has_a_pulse_and_one_that_is_stopped_has_none(worker: subprocess.Popen) -> None:
    pulse = Pulse(worker.pid, patience=0.8)
    assert not any(looks(pulse, 1.5)) and scheduler_ticks(worker.pid) > 0
    worker.send_signal(signal.SIGSTOP)
    assert not any(looks(pulse, 1.5, has_work=False)), "who has nothing to do may do nothing"
    hung = looks(pulse, 1.5)
    assert not hung[0] and hung[-1]
    worker.send_signal(signal.SIGCONT)
    assert not looks(pulse, 0.5)[-1]


def test_time_in_which_nobody_looked_does_not_count(worker: subprocess.Popen) -> None:
    """As when the whole machine was suspended."""
    worker.send_signal(signal.SIGSTOP)
    pulse = Pulse(worker.pid, patience=1.5)
    pulse.is_hung(True)
    time.sleep(2.5)
    assert not pulse.is_hung(True)


FOUNDER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "scheduler"])
print(worker.pid, flush=True)
sys.stdin.readline()
worker.wait()
print("waited", flush=True)
time.sleep(60)
"""


def test_a_scheduler_that_has_ended_is_known_at_once() -> None:
    """A zombie, before its parent has asked for it, as well as one that is gone."""
    leader = subprocess.Popen(
        [sys.executable, "-c", FOUNDER], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert leader.stdin is not None and leader.stdout is not None
        worker = int(leader.stdout.readline())
        pulse, deadline = Pulse(leader.pid, patience=5.0), time.monotonic() + 5
        while worker not in scheduler_ids(leader.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert pulse.ended() is None
        os.kill(worker, signal.SIGKILL)
        while pulse.ended() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert pulse.ended() == worker
        print(file=leader.stdin, flush=True)
        assert leader.stdout.readline() == "waited\n" and pulse.ended() == worker
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.communicate()


COMPILING = """
import subprocess, sys, time
print(flush=True)
subprocess.run(sys.argv[2:])
"""


@pytest.mark.parametrize("compiler, is_hung", [(["sh", "-c", "while :; do :; done"], False), ([sys.executable, "-c", BUSY], True)])
def test_a_scheduler_that_waits_for_a_compiler_is_not_hung(compiler: list[str], is_hung: bool) -> None:
    """But one whose Python helpers alone do something is."""
    command = [sys.executable, "-c", COMPILING, "scheduler", *compiler]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(1.0)  # it has begun
        assert looks(Pulse(process.pid, patience=1.0), 2.5)[-1] == is_hung
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

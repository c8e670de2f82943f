"""What happens to a server when it, or the process that started it, ends badly."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spice.game.records import Sampling
from megatron_spice.rollout.engine import EngineError
from megatron_spice.rollout.supervisor import SglangEngine
from tests.rollout.processes import assert_forked, processes, shared_memory

NewEngine = Callable[..., SglangEngine]

PARENT = """
import time
from pathlib import Path
import torch
from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.buckets import flatten
from megatron_spice.rollout.supervisor import SglangEngine
config = RolloutConfig(threads=1, max_total_tokens=4096)
engine = SglangEngine(config, Topology(), "fp32", Path({model!r}), Path({log!r}))
engine.launch()
engine.wait_ready()
engine.begin_update()
engine.update_bucket([("model.norm.weight", torch.ones(64))])
on_its_way = flatten([("model.norm.weight", torch.ones(64))])
print(engine.pid, flush=True)
time.sleep(600)
"""


def gone(leader: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while processes(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes(leader)


def test_killing_the_trainer_leaves_no_server_and_no_shared_memory(tiny_model: Path, tmp_path: Path) -> None:
    code = PARENT.format(model=str(tiny_model), log=str(tmp_path / "engine.log"))
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert parent.stdout is not None
        leader = int(parent.stdout.readline())
        assert len(processes(leader)) >= 3  # server, scheduler, detokenizer
        shared = shared_memory(parent.pid, *processes(leader))
        assert any(path.name.startswith("torch_") for path in shared)
    finally:
        parent.kill()
        parent.wait()
    assert gone(leader), processes(leader)
    deadline = time.monotonic() + 10
    while any(path.exists() for path in shared) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in shared if path.exists()]


def test_a_server_that_somebody_ends_while_it_starts_is_started_once_more(new_engine: NewEngine, tmp_path: Path, capfd) -> None:
    """(With two threads: nothing that the server imports may have begun to use them by the time that it forks its processes.)"""
    engine = new_engine(tmp_path / "engine.log", threads=2)
    try:
        engine.launch()
        first = engine.pid
        assert first is not None
        os.kill(first, signal.SIGTERM)
        engine.wait_ready()
        assert_forked(engine)
        assert engine.pid not in (None, first) and gone(first) and engine.weight_version() == "default"
        assert "ended by SIGTERM while it started" in capfd.readouterr().out
        engine.launch()
        first = engine.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineError, match="exit code -9"):
            engine.wait_ready()
    finally:
        engine.close()


def test_a_server_whose_scheduler_is_seen_to_end_first_is_started_once_more_too(new_engine: NewEngine, tmp_path: Path) -> None:
    """A signal to all of its processes ends them one after the other."""

    class StartedAgain(Exception):
        pass

    def start_again() -> None:
        raise StartedAgain

    engine = new_engine(tmp_path / "engine.log")
    try:
        engine.launch()
        engine._pulse = SimpleNamespace(ended=lambda: 1)
        engine.launch = start_again
        threading.Timer(0.1, os.kill, [engine.pid, signal.SIGTERM]).start()
        with pytest.raises(StartedAgain):
            engine.wait_ready()
    finally:
        engine.close()


def test_a_run_that_is_to_end_starts_no_engine_again(new_engine: NewEngine, tmp_path: Path) -> None:
    answers = iter([False])  # the rank hears of it a moment after its engine
    engine = new_engine(tmp_path / "engine.log", is_ending=lambda: next(answers, True))
    try:
        engine.launch()
        os.kill(engine.pid, signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(EngineError, match="the run was asked to end"):
            engine.wait_ready()
        engine.launch()
        last = engine.pid
        os.kill(last, signal.SIGTERM)
        with pytest.raises(EngineError, match="exit code -15|asked to end"):
            engine.wait_ready()
        assert engine.pid == last and time.monotonic() - began < 10, "it was started again"
    finally:
        engine.close()


def test_a_dead_server_is_an_error_at_once_and_can_be_replaced(new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(tmp_path / "engine.log")
    with pytest.raises(EngineError, match="not launched"):
        engine.check()
    try:
        engine.launch()
        leader = engine.pid
        assert leader is not None
        os.kill(leader, signal.SIGKILL)  # while it starts
        began = time.monotonic()
        with pytest.raises(EngineError, match="ended with exit code -9.*engine.log"):
            engine.wait_ready()
        assert time.monotonic() - began < 5 and gone(leader)

        engine.launch()
        engine.wait_ready()
        leader = engine.pid
        engine.check()
        running = asyncio.new_event_loop()
        work = running.create_task(engine.generate([40, 41], 4, Sampling(1.0, 480)))
        running.run_until_complete(asyncio.sleep(0.3))
        scheduler = subprocess.run(["pgrep", "-g", str(leader), "-f", "scheduler"], capture_output=True, text=True).stdout
        os.kill(int(scheduler.split()[0]), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match="(?s)/generate failed.*engine.log.*\n"):
            running.run_until_complete(work)
        assert time.monotonic() - began < 20
        running.run_until_complete(engine.close_requests())
        running.close()
        assert gone(leader)
        with pytest.raises(EngineError, match="ended with exit code"):
            engine.check()
    finally:
        engine.close()
    engine.close()


def test_a_server_that_cannot_start_says_why(new_engine: NewEngine, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    engine = new_engine(tmp_path / "engine.log", broken)
    try:
        engine.launch()
        with pytest.raises(EngineError, match="(?s)engine.log.*config"):
            engine.wait_ready()
    finally:
        engine.close()

"""What an evaluation names after its model: no two models share an exported folder, nor two runs a folder of results."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spice.evaluation import command
from megatron_spice.evaluation.command import Plan, name_of


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Makes plans for folders that hold one file; whether they are checkpoints is not asked."""
    monkeypatch.setattr(command.models, "check", lambda *_: None)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")

    def plan(model: str, *more: str) -> Plan:
        if not (tmp_path / model).exists():
            (tmp_path / model).mkdir(parents=True)
            (tmp_path / model / "weights").write_text("same")
        parser = argparse.ArgumentParser()
        command.add_options(parser)
        given = [str(tmp_path / model), "--tasks", "gsm8k", "--data", f"gsm8k={tmp_path}/rows.jsonl", "--output", str(tmp_path / "out")]
        return Plan(parser.parse_args([*given, *more]))

    return plan


def test_what_was_exported_of_one_model_is_not_served_as_another(planned, tmp_path, monkeypatch):
    served = []

    def export(checkpoint: Path, hf: Path | None, target: Path, is_stopped: Callable[[], bool]) -> Path:
        served.append(target)
        raise ValueError("enough")

    monkeypatch.setattr(command.models, "export", export)
    plans = [planned("a"), planned("b"), planned("a", "--hf", str(tmp_path / "b"))]
    (tmp_path / "a" / "weights").write_text("changed")
    plans.append(planned("a"))
    for plan in [*plans, planned("a")]:
        with pytest.raises(ValueError, match="enough"):
            asyncio.run(command.evaluate(plan))
        for log in plan.folder.glob("*.jsonl"):
            log.unlink()
    assert len(set(served)) == 4 and served[-1] == served[-2], "the same model, as it is, finds its own again"
    assert all(folder.parent == tmp_path / "out" for folder in served)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_export_that_would_take_long(planned, monkeypatch, capsys, number):
    looked = []

    def export(checkpoint: Path, hf: Path | None, target: Path, is_stopped: Callable[[], bool]) -> Path:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 60
        while not is_stopped():
            assert time.monotonic() < deadline, "nobody has told it to stop"
            time.sleep(0.02)
        looked.append(target)
        raise RuntimeError("stopped")

    monkeypatch.setattr(command.models, "export", export)
    plan, began = planned("a"), time.monotonic()
    assert command.run(plan.options) == 130
    assert looked == [plan.exported] and time.monotonic() - began < 20
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_same_iteration_of_two_runs_has_two_folders():
    first, other = (name_of(f"/home/x/runs/{run}/checkpoints/iteration_0000050") for run in "ab")
    assert (first, other) == ("a-iteration_0000050", "b-iteration_0000050")
    assert name_of("http://gpu7:30000/v1") == "gpu7-30000"

"""A small whole run of `tools/benchmark.py checkpoint`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from small_models import make_model

BENCHMARK = [sys.executable, str(Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"), "checkpoint"]


def test_saves_and_loads_are_measured_beside_their_ceilings(tmp_path):
    model = make_model(tmp_path / "hf", "llama", tied=True)
    command = [*BENCHMARK, "--model", model, "--precision", "fp32", "--data", "2", "--steps", "2", "--threads", "1", "--output", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "checkpoint.json").read_text())["results"]
    assert result["layout"] == "TP=1 PP=1 DP=2"
    weights = sum(parameter.numel() for parameter in _parameters(model))
    assert 16 * weights < result["gib"] * 2**30 < 1.1 * 16 * weights, "weight, master and two moments"
    assert {part for part, found in result["parts"].items() if "ceiling" in found} == {"stall", "write", "load"}
    assert all(found["seconds"] > 0 for found in result["parts"].values())
    assert all(len(seconds) == 3 for seconds in result["all_seconds"].values())
    assert result["beside"] > 0 and result["processor_seconds"] > 0
    assert "times the ceiling" in done.stdout


def _parameters(model: Path) -> list:
    from safetensors.torch import load_file

    return list(load_file(model / "model.safetensors").values())

"""The benchmark that the cost model's constants come from: its jobs are what the suites that run them expect."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_models import add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import benchmark_ranks  # noqa: E402
import calibrate_benchmark  # noqa: E402
from benchmark import _parser  # noqa: E402


@pytest.mark.parametrize("kind, which", [("policy", 7), ("sync", 0), ("checkpoint", 0)])
def test_a_case_is_measured_and_its_work_is_counted(tmp_path: Path, kind: str, which: int):
    """The jobs are run by other suites' code, which must find in them what it asks for. (An engine's take minutes.)"""
    model = make_model(tmp_path / "hf", "llama", tied=True)
    add_tokenizer(model)
    options = _parser().parse_args(["calibrate", "--model", str(model), "--steps", "1", "--only", kind, "--precision", "fp32"])
    job = {"suite": "calibrate", "time_limit": 200, **calibrate_benchmark.jobs(options)[which]}
    result = benchmark_ranks.run(job)
    assert result is not None, "a rank failed; what it said is above"
    [case] = calibrate_benchmark.cases_of([result])
    assert case.seconds > 0 and any(case.work.values())


def test_runs_without_their_corpus_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch):
    model = make_model(tmp_path / "hf", "llama", tied=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate_benchmark.machine, "device", lambda wanted: "cpu")
    with pytest.raises(SystemExit) as refused:
        calibrate_benchmark.jobs(_parser().parse_args(["calibrate", "--model", str(model), "--only", "policy,iteration"]))
    said = str(refused.value)
    assert "assets/factbook" in said and "examples/quickstart.sh" in said and "--only policy,engine,sync,checkpoint" in said

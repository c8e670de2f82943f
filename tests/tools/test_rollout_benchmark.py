"""How long engines were idle: the sums, the unevenness, and a small real run on two ranks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import benchmark_ranks  # noqa: E402
import rollout_benchmark  # noqa: E402


class Slow:
    def __init__(self, clock: list[float]) -> None:
        self.clock, self.pid = clock, 5

    async def generate(self, start: float, end: float) -> str:
        while self.clock[0] < end:
            await asyncio.sleep(0)
        return f"{start}-{end}"


def test_an_engine_is_busy_while_any_request_runs():
    clock = [0.0]
    engine = rollout_benchmark.Watched(Slow(clock), lambda: clock[0])

    async def time_passes():
        first = asyncio.ensure_future(engine.generate(0.0, 4.0))
        for _ in range(10):
            await asyncio.sleep(0)
            clock[0] += 1.0
            if clock[0] == 2.0:
                second = asyncio.ensure_future(engine.generate(2.0, 6.0))
        assert [await first, await second] == ["0.0-4.0", "2.0-6.0"]

    asyncio.run(time_passes())
    assert 5.0 <= engine.busy <= 7.0 and engine.requests == 2 and engine.pid == 5, "0 to 6, whoever asked"


def test_passages_differ_and_are_the_same_in_every_rank():
    job = {"seed": 0, "passages": 40}
    words = [len(text.split()) for text in rollout_benchmark.texts(job, 1)]
    assert words == [len(text.split()) for text in rollout_benchmark.texts(job, 1)] and max(words) > 4 * min(words)
    drawn = [rollout_benchmark.limits(0, 1, slot, 96) for slot in range(40)]
    for name, low, high in (("attempts", 8, 64), ("challenger_max_tokens", 8, 96), ("reasoner_max_tokens", 4, 48)):
        values = [each[name] for each in drawn]
        assert low <= min(values) < high / 4 and high / 2 < max(values) <= high


def test_idle_time_ends_with_an_engines_last_passage():
    about = {"requests": 3, "processor": 9.0, "longest_passage": 5.0, "shortest_passage": 1.0}
    one = {"began": 100.0, "ended": 110.0, "busy": 9.0, "passages": 4, **about}
    two = {"began": 100.0, "ended": 120.0, "busy": 20.0, "passages": 6, **about}
    none = {"began": 100.0, "ended": 100.0, "busy": 0.0, "passages": 0, **about}
    found = rollout_benchmark.summary([[one, two]])
    assert found["idle"] == pytest.approx(1 / 30) and found["most_idle"] == pytest.approx(0.1)
    assert found["tail"] == pytest.approx(0.5) and found["processor"] == pytest.approx(0.6)
    assert rollout_benchmark.summary([[one, none]])["idle"] == pytest.approx(0.1)
    text = rollout_benchmark.table([{"rounds": [[one, two, none]], **found}])
    assert "idle while work remains: 3.33%" in text and "10.00%" in text


def test_a_job_that_takes_too_long_is_ended(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_ranks, "BENCHMARK", tmp_path / "sleeps.py")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "sleeps.py").write_text("import time; print('still here', flush=True); time.sleep(100)")
    assert benchmark_ranks.run({"ranks": 2, "threads": 1, "time_limit": 2}) is None
    errors = capfd.readouterr().err
    assert "not done within 2 s" in errors and "still here" in errors
    assert not list(tmp_path.glob("spice-benchmark-*")), "its temporary folder goes with it"


def test_a_small_run_on_two_engines(tmp_path):
    model = add_tokenizer(make_model(tmp_path / "hf", "llama", tied=True))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    command = [
        sys.executable, ROOT / "tools" / "benchmark.py", "rollout", "--model", model, "--rounds", 1, "--passages", 5,
        "--in-flight", 2, "--most-tokens", 8, "--threads", 1, "--output", tmp_path / "out", "--time-limit", 200,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "out" / "rollout.json").read_text())["results"]
    [engines] = result["rounds"]
    assert sum(engine["passages"] for engine in engines) == 5 and len(engines) == 2
    for engine in engines:
        assert 0 < engine["busy"] <= engine["ended"] - engine["began"] and engine["requests"] >= engine["passages"]
    assert 0 <= result["idle"] < 1

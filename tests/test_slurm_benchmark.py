"""slurm/benchmark.sh on a real Slurm, what it refuses, and what a comparison of two results says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_cluster import cluster_or_skip, why_not
from tiny_recipe import tiny_recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "benchmark.sh"
sys.path.insert(0, str(ROOT / "tools"))
import node_report  # noqa: E402

ALONE = ["cluster.ranks_per_node=1", "policy.pipeline_parallel_size=1", "rollout.threads=1"]
SUITES = {"policy", "sync", "rollout", "iteration", "checkpoint"}
needs_slurm = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("job"))


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SPICE_"))}
    return {**clean, "SPICE_VENV": sys.prefix, **more}


@pytest.mark.parametrize("arguments, named", [
    ([], "usage:"),
    (["--nodes-list", "1,2", "RECIPE"], "unknown option --nodes-list"),
    (["--ranks-list", "1,x", "RECIPE"], "--ranks-list 1,x"),
    (["--iterations", "0", "RECIPE"], "--iterations 0"),
    (["--ranks-list", "1,2", "RECIPE", "policy.pipeline_parallel_size=2"], "does not divide the 1 ranks"),
    (["--ranks-list", "1", "RECIPE", "train.passagess=2"], "train.passagess"),
])  # fmt: skip
def test_a_wrong_start_ends_with_2_before_any_run(recipe, tmp_path, arguments, named):
    words = [str(recipe) if word == "RECIPE" else word for word in arguments]
    if len(words) > 1 and "--output" not in words:
        words = ["--output", str(tmp_path / "out"), *words]
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert not list(tmp_path.glob("out/*/metrics.jsonl"))


def test_runs_of_an_earlier_call_are_left_alone(recipe, tmp_path):
    log = tmp_path / "out" / "ranks-2" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.touch()
    command = ["bash", str(SCRIPT), "--ranks-list", "1,2", "--output", "out", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "out/ranks-2 is of an earlier call" in done.stderr and "rm -r out/ranks-2" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ranks-2"] and log.is_file()


@needs_slurm
@pytest.mark.timeout(600)
def test_two_numbers_of_nodes_in_one_allocation(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    log, output = folder / "job.log", folder / "out"
    with cluster_or_skip(folder / "cluster") as slurm:
        exports = f"ALL,SPICE_VENV={sys.prefix},GLOO_SOCKET_IFNAME=lo,OMP_NUM_THREADS=1"
        number = slurm.client(
            "sbatch", "--parsable", "--nodes=2", f"--export={exports}", f"--output={log}", str(SCRIPT), "--nodes-list", "1,2",
            "--iterations", "1", "--output", str(output), str(recipe), *ALONE, cwd=ROOT,
        ).strip()  # fmt: skip
        ended = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=500)
        assert ended["JobState"] == "COMPLETED", log.read_text()[-4000:]
    report = node_report.read_report(output / "benchmark.json")
    assert [(each.count, each.ranks, each.passages) for each in report.counts] == [(1, 1, 3), (2, 2, 6)]
    assert report.counts[0].efficiency == 1.0 and 0 < report.counts[1].efficiency < 2
    for each in report.counts:
        assert set(each.suites) == SUITES and all(one.values for suite in each.suites.values() for one in suite.values())
        assert sum(each.phases.values()) == pytest.approx(each.suites["iteration"]["seconds"].median, rel=0.05)
    assert report.seed == 5 and report.revision and report.versions["torch"]
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    text = node_report.comparison(report, report)
    assert "warning" not in text and "worse" not in text and "1.000" in text


def made(seconds: list[float], seed: int = 0) -> node_report.Report:
    suite = {"iteration": {"seconds": node_report.Measurement(values=seconds, unit="s", better="less")}}
    count = node_report.Count(count=1, ranks=1, passages=4, suites=suite, phases={}, predicted={}, efficiency=1.0)
    return node_report.Report(
        date="2026-01-01", command="", revision="0" * 40, seed=seed, unit="nodes", machine={}, versions={}, recipe="", counts=[count]
    )


def test_a_comparison_tells_noise_from_change():
    before = made([10.0, 10.4, 9.8, 10.1, 10.2])
    assert "better" in node_report.comparison(before, made([8.0, 8.2, 8.1, 7.9, 8.0]))
    assert "worse" in node_report.comparison(before, made([12.0, 12.2, 12.1, 11.9, 12.0]))
    noise = node_report.comparison(before, made([10.3, 9.7, 10.1, 10.2, 10.0], seed=1))
    assert "better" not in noise and "worse" not in noise and "differ in seed" in noise


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_the_bounds_hold_the_ratio(values, factor):
    middle, low, high = node_report.ratio_bounds(values, [factor * value for value in values])
    assert middle == pytest.approx(factor) and low <= middle * (1 + 1e-9) and high >= middle * (1 - 1e-9)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(SystemExit, match="no result of slurm/benchmark.sh"):
        node_report.read_report(path)

"""slurm/benchmark.sh on a real Slurm, what it refuses, and what a comparison of two results says."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_cluster import ENDED, why_not
from tiny_recipe import tiny_recipe

from megatron_spice.checkpoint.ownership import Ownership
from megatron_spice.config.describe import resolved
from megatron_spice.config.loader import load_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "benchmark.sh"
sys.path.insert(0, str(ROOT / "tools"))
import node_benchmark  # noqa: E402
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


def test_runs_with_other_settings_are_left_alone(recipe, tmp_path):
    folder = tmp_path / "out" / "ranks-2"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("train: {passages: 7}\n")
    command = ["bash", str(SCRIPT), "--ranks-list", "2", "--output", "out", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"{folder} is of an earlier call with other settings" in done.stderr
    assert f"rm -r {folder}" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ranks-2"] and (folder / "recipe.yaml").is_file()


def call(command: str, recipe: Path, output: Path, *options: str, iterations: int = 9) -> list[str]:
    """Arguments of node_benchmark.py for a benchmark by nodes."""
    return [command, "--unit", "nodes", "--iterations", str(iterations), "--output", str(output), *options, str(recipe), *ALONE]


def made_run(capsys, recipe: Path, output: Path, count: int, seconds: list[float]) -> Path:
    """A run's folder after iterations that took so long; each third of them is saved, as its overrides say."""
    assert node_benchmark.main(call("overrides", recipe, output, "--count", str(count))) == 0
    config = load_config(recipe, capsys.readouterr().out.splitlines())
    lines = [
        {"iteration": number, "seconds/iteration": each, "seconds/play": each / 2, "seconds/train": each / 2, "policy/tokens": 100,
         "challenger/attempts": 8, "challenger/length": 9, "seconds/save": 0.1 if number % config.checkpoint.every == 1 else 0.0}
        for number, each in enumerate(seconds, start=1)
    ]  # fmt: skip
    config.run.dir.mkdir(parents=True)
    (config.run.dir / "recipe.yaml").write_text(resolved(config))
    (config.run.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config.run.dir


def test_what_is_complete_is_collected_and_the_same_call_makes_the_rest(recipe, tmp_path, capsys):
    output = tmp_path / "out"
    made_run(capsys, recipe, output, 1, [99.0, *[8.0, 10.0, 12.0] * 3])
    made_run(capsys, recipe, output, 2, [99.0, *[10.0, 12.5, 15.0] * 3])
    broken = made_run(capsys, recipe, output, 4, [99.0, 10.0])
    assert node_benchmark.main(call("collect", recipe, output, "--counts", "1,2,4")) == 1
    said = capsys.readouterr().err
    assert "not complete: 4 nodes" in said and f"--output {output} makes what is missing" in said
    report = node_report.read_report(output / "benchmark.json")
    assert [(each.count, each.passages, each.efficiency) for each in report.counts] == [(1, 3, 1.0), (2, 6, 0.8)]
    assert report.command == f"slurm/benchmark.sh --nodes-list 1,2,4 --iterations 9 {recipe} {' '.join(ALONE)}"
    assert node_benchmark.main(call("overrides", recipe, output, "--count", "2")) == 0 and capsys.readouterr().out == ""
    assert node_benchmark.main(call("overrides", recipe, output, "--count", "4")) == 0 and f"run.dir={broken}\n" in capsys.readouterr().out
    assert not broken.exists() and (output / "nodes-4.unfinished-1" / "metrics.jsonl").is_file()
    made_run(capsys, recipe, output, 4, [99.0, *[20.0] * 9])
    assert node_benchmark.main(call("collect", recipe, output, "--counts", "1,2,4")) == 0
    assert [each.efficiency for each in node_report.read_report(output / "benchmark.json").counts] == [1.0, 0.8, 0.5]
    assert node_benchmark.main(call("overrides", recipe, output, "--count", "4", iterations=5)) == 2


def test_a_run_that_goes_on_still_is_not_set_aside(recipe, tmp_path, capsys):
    folder = made_run(capsys, recipe, tmp_path / "out", 1, [99.0])
    other = [sys.executable, ROOT / "tools" / "node_benchmark.py", *call("overrides", recipe, tmp_path / "out", "--count", "1")]
    with Ownership(folder):
        done = subprocess.run(other, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 2 and "is in use" in done.stderr and folder.is_dir()


def test_where_nothing_is_complete_there_is_no_result(recipe, tmp_path, capsys):
    assert node_benchmark.main(call("collect", recipe, tmp_path / "out", "--counts", "1,2")) == 1
    assert "not complete: 1, 2 nodes" in capsys.readouterr().err and not (tmp_path / "out").exists()


@needs_slurm
@pytest.mark.timeout(600)
def test_two_numbers_of_nodes_in_one_allocation(slurm, recipe, tmp_path):
    log, output = tmp_path / "job.log", tmp_path / "out"
    exports = f"ALL,SPICE_VENV={sys.prefix},GLOO_SOCKET_IFNAME=lo,OMP_NUM_THREADS=1"
    number = slurm.client(
        "sbatch", "--parsable", "--nodes=2", f"--export={exports}", f"--output={log}", str(SCRIPT), "--nodes-list", "1,2",
        "--iterations", "3", "--output", str(output), str(recipe), *ALONE, cwd=ROOT,
    ).strip()  # fmt: skip
    ended = slurm.wait(number, *ENDED, seconds=500)
    assert ended["JobState"] == "COMPLETED", log.read_text()[-4000:]
    report = node_report.read_report(output / "benchmark.json")
    assert [(each.count, each.ranks, each.passages) for each in report.counts] == [(1, 1, 3), (2, 2, 6)]
    middles = [statistics.median(line["seconds/iteration"] for line in timed(output / f"nodes-{count}")) for count in (1, 2)]
    assert [each.efficiency for each in report.counts] == [1.0, pytest.approx(middles[0] / middles[1])]
    for each in report.counts:
        assert set(each.suites) == SUITES and all(one.values for suite in each.suites.values() for one in suite.values())
        assert len(each.suites["checkpoint"]["waited_seconds"].values) == 3, "each of three iterations follows a save"
        run = output / f"nodes-{each.count}"
        assert f"began rank 0 of {each.ranks} on n1, " in (run / "logs" / "rank_0.log").read_text(), "the first node, where all meet"
        checkpoint = run / "checkpoints" / "iteration_0000004"
        size = sum(file.stat().st_size for file in checkpoint.rglob("*.distcp"))
        assert each.suites["checkpoint"]["gib"].median * 2**30 == pytest.approx(size, rel=0.05)
        seconds = each.suites["iteration"]["seconds"].values
        assert 0.7 * min(seconds) < sum(each.phases.values()) < 1.3 * max(seconds), "medians of three iterations, on a busy machine"
    assert report.seed == 5 and report.revision and report.versions["torch"]
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    text = node_report.comparison(report, report)
    assert "warning" not in text and "worse" not in text and "1.000" in text


def timed(run: Path) -> list[dict]:
    """What the run's log has of its three iterations after the first."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    return lines[1:]


def measured(seconds: list[float]) -> node_report.Measurement:
    return node_report.Measurement(values=seconds, unit="s", better="less")


def made(seconds: list[float], seed: int = 0) -> node_report.Report:
    suite = {"iteration": {"seconds": measured(seconds)}}
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


@pytest.mark.parametrize("before, after", [([1.0], [1.01]), ([1.0], [9.0]), ([1.0, 1.0], [2.0, 2.0]), ([1.0], [2.0] * 9)])
def test_nothing_is_said_of_a_few_values(before, after):
    said = node_report.comparison(made(before), made(after))
    assert "below 3 values" in said and "better" not in said and "worse" not in said


@pytest.mark.parametrize("here, there, scatter", [(3, 3, 1.0), (5, 5, 1.0), (3, 9, 1.0), (5, 5, 4.0), (4, 8, 0.25)])
def test_what_has_not_changed_is_seldom_said_to_have(here, there, scatter):
    """Of two equal distributions at most one comparison in twenty and a little is flagged, also where one side scatters more."""
    rng, flagged, tries = random.Random(0), 0, 1000
    for _ in range(tries):
        sides = [[10.0 * math.exp(rng.gauss(0.0, 0.03 * width)) for _ in range(count)] for count, width in ((here, 1.0), (there, scatter))]
        _, low, high = node_report.ratio_bounds(*sides)
        flagged += not low <= 1.0 <= high
    assert flagged / tries <= 0.07


def test_a_change_of_a_tenth_is_seen_in_five_iterations():
    """Where they scatter by 3 %, nearly always."""
    rng, seen = random.Random(1), 0
    for _ in range(200):
        before, after = ([seconds * math.exp(rng.gauss(0.0, 0.03)) for _ in range(5)] for seconds in (10.0, 11.0))
        seen += node_report.verdict(measured(before), measured(after)) == "worse"
    assert seen > 180


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_the_bounds_hold_the_ratio(values, factor):
    middle, low, high = node_report.ratio_bounds(values, [factor * value for value in values])
    assert middle == pytest.approx(factor) and low <= middle * (1 + 1e-9) and high >= middle * (1 - 1e-9)


def test_a_suite_of_saves_has_what_followed_one():
    """Each other iteration is saved: the lines of the next have its seconds, and the others' `save` is a look whether it is written."""
    line = {"challenger/attempts": 8, "challenger/length": 9, "seconds/play": 1.0, "policy/tokens": 9, "seconds/train": 1.0}
    lines = [{**line, "iteration": number, "seconds/save": 0.5 if number % 2 else 0.001} for number in range(2, 8)]
    lines[2] |= {"save/write_seconds": 3.0, "save/gib": 2.0}
    found = node_benchmark.suites(lines, 8, 2)["checkpoint"]
    assert [found[name].values for name in ("waited_seconds", "write_seconds", "gib")] == [[0.5] * 3, [3.0], [2.0]]


@pytest.mark.parametrize("every, iterations, told", [(2, 1, 1), (2, 3, 1), (2, 9, 2), (10, 9, 3), (10, 100, 10)])
def test_saves_are_made_as_the_recipe_says_and_three_are_measured(recipe, tmp_path, capsys, every, iterations, told):
    arguments = [*call("overrides", recipe, tmp_path / "out", "--count", "2", iterations=iterations), f"checkpoint.every={every}"]
    assert node_benchmark.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"checkpoint.every={told}", "checkpoint.resume=never"]
    following = [number for number in range(2, iterations + 2) if (number - 1) % told == 0]
    assert len(following) >= min(3, iterations)


def test_what_a_default_call_measures_of_saves_is_enough_to_be_compared(recipe, tmp_path, capsys):
    made_run(capsys, recipe, tmp_path / "out", 1, [10.0] * 10)
    assert node_benchmark.main(call("collect", recipe, tmp_path / "out", "--counts", "1")) == 0
    report = node_report.read_report(tmp_path / "out" / "benchmark.json")
    assert report.counts[0].suites["checkpoint"]["waited_seconds"].values == [0.1] * 4, "the recipe saves each second iteration"
    assert "below" not in node_report.comparison(report, report)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(SystemExit, match="no result of slurm/benchmark.sh"):
        node_report.read_report(path)

"""The benchmark's options, its table, and a whole small run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "policy"]


def _run(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [*BENCHMARK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("arguments, named", [
    (["--model", "nowhere"], "nowhere"),
    (["--model", "1b", "--layouts", "tp=1;xp=2"], "xp=2"),
    (["--model", "1b", "--precision", "bf16,int8"], "int8"),
    (["--model", "1b", "--against", "transformers"], "--model"),
    (["--model", "1b", "--steps", "0"], "0 is not a positive number"),
    (["--model", "1b", "--prompt", "12,x"], "x is not a positive number"),
    (["--model", "1b", "--against", "unshared", "--unshared"], "--unshared"),
])  # fmt: skip
def test_bad_options_are_named(arguments, named):
    done = _run(*arguments)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr


def test_a_small_run(tmp_path):
    model = make_model(tmp_path / "hf", "llama", tied=True)
    done = _run(
        "--model", model, "--layouts", "tp=1;pp=2", "--precision", "fp32", "--steps", 2, "--groups", 2, "--group-size", 4,
        "--prompt", 12, "--completion", 4, "--row-tokens", 64, "--output", tmp_path / "out", "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "policy.json").read_text())
    one, two = report["results"]
    assert (one["layout"], two["layout"]) == ("TP=1 PP=1 DP=1", "TP=1 PP=2 DP=1")
    for result in report["results"]:
        assert result["tokens"] == 2 * 4 * 16 and result["computed_tokens"] == 2 * (12 + 4 * 4)
        assert len(result["seconds"]) == 2 and 0 < result["share_of_ceiling"] < 1 and result["peak_gib"] > 0.1
    work = [result["tflops"] * statistics.median(result["seconds"]) for result in report["results"]]
    assert work[0] == pytest.approx(work[1]), "a layout does not change what there is to compute"
    assert {"command", "machine", "versions", "seed", "date"} <= report.keys()
    assert done.stdout.rstrip().splitlines()[-2].startswith("TP=1 PP=1 DP=1")


def test_against_transformers(tmp_path):
    model = make_model(tmp_path / "hf", "llama", tied=True)
    done = _run(
        "--model", model, "--precision", "bf16", "--steps", 1, "--groups", 1, "--group-size", 4, "--prompt", 12, "--completion",
        4, "--against", "transformers", "--unshared", "--output", tmp_path, "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "policy.json").read_text())["results"]
    assert result["ratio"] == pytest.approx(result["their_seconds"][0] / result["seconds"][0])
    assert result["computed_tokens"] == result["tokens"]


def test_against_itself_without_sharing(tmp_path):
    """Both compute the same gradient; in float32, by ranks that cut the layers between them."""
    model = make_model(tmp_path / "hf", "llama", tied=True)
    done = _run(
        "--model", model, "--precision", "fp32", "--layouts", "pp=2", "--steps", 1, "--groups", 2, "--group-size", 4, "--prompt",
        "12,3", "--completion", 4, "--against", "unshared", "--no-warm-up", "--output", tmp_path, "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "policy.json").read_text())["results"]
    assert result["computed_tokens"] == 12 + 3 + 8 * 4 and result["tokens"] == 4 * (16 + 7)
    assert len(result["seconds"]) == len(result["their_seconds"]) == 1
    ours, theirs = result["first_gradient_norms"].values()
    assert ours == pytest.approx(theirs, rel=1e-4) and ours > 0


def test_twenty_syncs_in_a_row_leave_memory_and_open_files_where_they_were(tmp_path):
    model = add_tokenizer(make_model(tmp_path / "hf", "llama", tied=True))
    command = [*BENCHMARK[:-1], "sync", "--model", str(model), "--steps", "20", "--threads", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "out" / "sync.json").read_text())["results"]
    assert len(result["all_seconds"]["sync"]) == 21 and result["ratio"] > 0 and result["gib"] > 0
    growth = result["growth"]
    # Fewer is possible: a connection from before may be closed meanwhile.
    assert growth["trainer_files"] <= 0 and growth["engine_files"] <= 0
    assert growth["trainer_mib"] < 16 and growth["engine_mib"] < 16
    assert set(result["parts"]) == {"begin_update", "update_bucket", "end_update"}


def test_a_sync_of_what_is_no_model_is_refused(tmp_path):
    done = subprocess.run([*BENCHMARK[:-1], "sync", "--model", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is no Hugging Face folder" in done.stderr

"""The main job, run as a person runs it: two Megatron ranks, a real SGLang engine, a real corpus.

What needs many iterations runs on a tiny random model, which writes no valid task and so learns nothing; that tasks vary,
rewards follow from the log and weights change is seen in one iteration of the quickstart's own model, in float32.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_models import TEXT, add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "smollm2-135m-instruct"
TEXTS = ROOT / "assets" / "factbook.jsonl"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    model = add_tokenizer(make_model(folder / "hf", "llama", tied=True))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{number}. {TEXT * 3}", "id": str(number)}) + "\n" for number in range(40)))
    _tool("preprocess_corpus", texts, "--tokenizer", model, "--output", folder / "corpus", "--max-tokens", 40, "--min-tokens", 10)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({
        "run": {"dir": str(folder / "unused")}, "corpus": {"path": str(folder / "corpus")},
        "train": {"iterations": 4, "passages": 3, "seed": 5},
        "game": {"prompt_style": "few_shot", "answer_types": ["Integer"], "attempts": 4, "group_size": 2,
                 "attempt_chunk": 2, "challenger_max_tokens": 6, "reasoner_max_tokens": 4},
        "rollout": {"max_total_tokens": 4096, "context_length": 1024, "max_running_requests": 8},
        "policy": {"model": str(model), "pipeline_parallel_size": 2, "precision": "fp32"},
        "checkpoint": {"every": 2}, "cluster": {"ranks_per_node": 2, "timeout": 120},
    }))  # fmt: skip
    # The model's context of 256 positions is less than the prompts of byte-sized tokens need.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return path


def _tool(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)], check=True, timeout=120)


def _start(recipe: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    environment = {**os.environ, "SPICE_VENV": str(Path(sys.prefix))}
    return subprocess.Popen(
        ["bash", ROOT / "slurm" / "spice.sh", recipe, f"run.dir={run_dir}", *overrides], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _finish(job: subprocess.Popen, code: int = 0) -> str:
    output = job.communicate(timeout=400)[0]
    assert job.returncode == code, output[-6000:]
    return output


def _passages(run_dir: Path) -> list[tuple[int, int]]:
    lines = (run_dir / "episodes.jsonl").read_text().splitlines()
    return [(episode["iteration"], episode["passage"]["index"]) for episode in map(json.loads, lines)]


def _metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _wait_gone(processes: list[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=seconds)[1]


def _is_trainer(process: psutil.Process) -> bool:
    try:
        return "megatron_spice" in process.cmdline() and "train" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_a_killed_run_goes_on_with_the_passages_an_uninterrupted_one_sees(recipe, tmp_path):
    through = _finish(_start(recipe, tmp_path / "through"))
    assert [line.split(" |")[0] for line in through.splitlines() if line.startswith("iteration ")] == [
        f"iteration {number}/4" for number in (1, 2, 3, 4)
    ]
    first = _metrics(tmp_path / "through")[0]
    assert first["sync/difference"] < 0.02, "in float32 the engine must compute what the policy computes"
    assert first["seconds/other"] < 0.1 * first["seconds/iteration"]

    job = _start(recipe, tmp_path / "killed")
    saved = tmp_path / "killed" / "checkpoints" / "iteration_0000002"
    deadline = time.monotonic() + 300
    while not saved.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0][-6000:]
        time.sleep(0.05)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in family:
        if _is_trainer(process):  # torchrun and the ranks; their engines and verifiers must notice by themselves
            os.kill(process.pid, signal.SIGKILL)
    job.communicate()
    assert not _wait_gone(family), "something outlived the killed job"

    resumed = _finish(_start(recipe, tmp_path / "killed"))
    assert "resumed from" in resumed and "iteration 1/4" not in resumed
    assert _passages(tmp_path / "killed") == _passages(tmp_path / "through")
    assert [line["iteration"] for line in _metrics(tmp_path / "killed")] == [1, 2, 3, 4]
    assert "nothing to do" in _finish(_start(recipe, tmp_path / "killed"))


def test_tensor_parallel_ranks_feed_a_tensor_parallel_engine(recipe, tmp_path):
    _finish(_start(
        recipe, tmp_path, "train.iterations=1", "policy.pipeline_parallel_size=1", "policy.tensor_parallel_size=2",
        "rollout.tensor_parallel_size=2",
    ))  # fmt: skip
    [metrics] = _metrics(tmp_path)
    assert metrics["sync/difference"] < 0.02


@pytest.mark.parametrize("override, words", [
    ("policy.tensor_parallel_size=3", ["policy.tensor_parallel_size=3", "2 ranks"]),
    ("train.iteration=4", ["train.iteration", "train.iterations"]),
    ("game.group_size=many", ["game.group_size", "many"]),
])  # fmt: skip
def test_a_recipe_that_cannot_run_ends_with_2_before_anything_starts(recipe, tmp_path, override, words):
    output = _finish(_start(recipe, tmp_path / "run", override), code=2)
    assert all(word in output for word in words), output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not (MODEL.exists() and TEXTS.exists()), reason="needs the quickstart's assets (tests/run.sh fetches them)")
def test_the_real_model_learns_from_what_the_log_says(tmp_path):
    _tool("preprocess_corpus", TEXTS, "--tokenizer", MODEL, "--output", tmp_path / "corpus", "--max-tokens", 160, "--min-tokens", 60)
    run = tmp_path / "run"
    _finish(_start(
        ROOT / "examples" / "quickstart.yaml", run, "train.iterations=1", "train.passages=3", "policy.precision=fp32",
        f"policy.model={MODEL}", f"corpus.path={tmp_path / 'corpus'}",
    ))  # fmt: skip
    [metrics] = _metrics(run)
    assert metrics["drift/mean"] < 0.02, "engine and policy must give the sampled tokens the same probability"
    assert metrics["sync/difference"] < 0.02
    assert 0 < metrics["challenger/valid_share"] < 1 and metrics["policy/grad_norm"] > 0

    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == 3
    for episode in episodes:
        group = [attempt for attempt in episode["attempts"] if attempt["in_group"]]
        mean = sum(attempt["reward"] for attempt in group) / len(group)
        for attempt in group:
            p = sum(answer["correct"] for answer in attempt["answers"]) / 8
            reward = math.exp(-((p * (1 - p) - 0.25) ** 2) / 0.02) if attempt["valid"] else -0.1
            assert attempt["reward"] == pytest.approx(reward)
            assert attempt["advantage"] == pytest.approx(reward - mean)

    _tool("convert_checkpoint", "megatron-to-hf", run / "checkpoints" / "iteration_0000001", tmp_path / "trained")
    before, after = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert len(changed) > 0.9 * len(before), "the weights did not change"

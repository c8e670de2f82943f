"""`sbatch slurm/spice.sh` on a real Slurm with two nodes: the whole life of a job that is never left in peace.

The nodes are both this machine. Ranks, engines, checkpoints and requeueing are real; the model is tiny and random.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, cluster_or_skip, why_not
from tiny_recipe import tiny_recipe

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
SEED = 5
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    with cluster_or_skip(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("job"))


class Job:
    """A submitted run; `sleep_until` and `end` fail with its log."""

    def __init__(self, slurm: Cluster, recipe: Path, run_dir: Path, *overrides: str):
        self.slurm, self.run_dir, self.log = slurm, run_dir, run_dir.with_suffix(".log")
        environment = {"SPICE_VENV": str(Path(sys.prefix)), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        exports = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        self.number = int(slurm.client(
            "sbatch", "--parsable", "--nodes=2", f"--export={exports}", f"--output={self.log}", str(ROOT / "slurm" / "spice.sh"),
            str(recipe), f"run.dir={run_dir}", *overrides, cwd=ROOT,
        ))  # fmt: skip

    def iterations(self) -> list[int]:
        log = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["iteration"] for line in log.read_text().splitlines()] if log.is_file() else []

    def sleep_until(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.story()
            assert self.slurm.job(self.number)["JobState"] not in ("FAILED", "CANCELLED", "COMPLETED"), self.story()
            time.sleep(0.2)

    def end(self, state: str, seconds: float = 300.0) -> None:
        ended = self.slurm.wait(self.number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert ended["JobState"] == state, self.story()

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def story(self) -> str:
        return f"{self.slurm.job(self.number)}\n{self.log.read_text()[-6000:] if self.log.is_file() else 'no log'}"


def ranks(run_dir: Path) -> list[psutil.Process]:
    """The training ranks of a run, wherever they are."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and f"run.dir={run_dir}" in words and "megatron_spice.launch" not in words and "RANK" in _environ(process):
            found.append(process)
    return found


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_a_job_that_is_requeued_cut_short_killed_and_cancelled_plays_every_passage_once(slurm, recipe, tmp_path):
    """Two nodes of two ranks, tensor and pipeline parallel. Only the last iteration is due for a checkpoint: every other one is
    made because the job was asked to end, apart from the one before the crash."""
    run_dir = tmp_path / "run"
    settings = ("policy.tensor_parallel_size=2", "train.iterations=12", "checkpoint.every=6", "cluster.timeout=60")
    job = Job(slurm, recipe, run_dir, *settings)

    job.sleep_until(lambda: len(job.iterations()) >= 2)
    slurm.client("scontrol", "requeue", str(job.number))  # as a preemption does: SIGTERM for all processes, then the queue
    job.sleep_until(lambda: job.restarts() == 1 and len(job.iterations()) >= 4)
    slurm.client("scancel", "--batch", "--signal=USR1", str(job.number))  # as the end of the time limit announces itself
    job.sleep_until(lambda: job.restarts() == 2)
    job.sleep_until(lambda: 6 in job.iterations() and list(run_dir.glob("checkpoints/iteration_0000006")) != [] and ranks(run_dir) != [])
    ranks(run_dir)[-1].kill()
    job.sleep_until(lambda: job.restarts() == 3 and len(job.iterations()) >= 8)
    slurm.client("scancel", str(job.number))
    job.end("CANCELLED")
    saved = sorted(path.name for path in run_dir.glob("checkpoints/*"))
    assert saved and not any(name.endswith(".partial") for name in saved), saved

    again = Job(slurm, recipe, run_dir, *settings)
    again.end("COMPLETED")
    assert "resumed from" in again.log.read_text(), again.story()
    assert again.iterations() == list(range(1, 13))
    episodes = [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]
    sampler = PassageSampler(Corpus(recipe.parent / "corpus", TextTokenizer.from_dir(recipe.parent / "hf")), SEED)
    expected = [(number, passage.index) for number in range(1, 13) for passage in sampler.next(3)]
    assert [(episode["iteration"], episode["passage"]["index"]) for episode in episodes] == expected
    assert not ranks(run_dir), "something outlived the job"
    log = job.log.read_text()
    assert log.count("interrupted (SIGTERM)") + log.count("interrupted (SIGUSR1)") >= 2, log[-6000:]

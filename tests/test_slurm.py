"""`sbatch slurm/spice.sh` on a real Slurm with two nodes: the whole life of a job that is never left in peace.

The nodes are both this machine. Ranks, engines, checkpoints and requeueing are real; the model is tiny and random.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, cluster_or_skip, why_not
from tiny_recipe import tiny_recipe

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.telemetry import rank_logs

ROOT = Path(__file__).resolve().parents[1]
SEED = 5
KILLED_SEED = int(os.environ.get("SPICE_KILLED_SEED", time.time_ns() % 1000))
"""Draws the ranks that are killed; printed, so that a failure can be had again."""
pytestmark = [pytest.mark.timeout(1500), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    with cluster_or_skip(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("job"))


class Job:
    """A submitted run; `sleep_until` and `end` fail with its log."""

    def __init__(self, slurm: Cluster, recipe: Path, run_dir: Path, *overrides: str, options: Sequence[str] = ()):
        self.slurm, self.run_dir, self.log = slurm, run_dir, run_dir.with_suffix(".log")
        environment = {"SPICE_VENV": str(Path(sys.prefix)), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        exports = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        self.number = int(slurm.client(
            "sbatch", "--parsable", "--nodes=2", f"--export={exports}", f"--output={self.log}", *options,
            str(ROOT / "slurm" / "spice.sh"), str(recipe), f"run.dir={run_dir}", *overrides, cwd=ROOT,
        ))  # fmt: skip

    def iterations(self) -> list[int]:
        log = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["iteration"] for line in log.read_text().splitlines()] if log.is_file() else []

    def sleep_until(self, condition: Callable[[], bool], seconds: float = 480.0) -> None:
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
        log = self.log.read_text()[-4000:] if self.log.is_file() else "no log"
        return "\n".join([log, *self.slurm.ends_of_logs(1000), str(self.slurm.job(self.number))])


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


def rank_of(run_dir: Path, rank: int) -> psutil.Process | None:
    return next((process for process in ranks(run_dir) if _environ(process).get("RANK") == str(rank)), None)


def signal_rank(job: Job, rank: int, number: int) -> None:
    job.sleep_until(lambda: rank_of(job.run_dir, rank) is not None)
    rank_of(job.run_dir, rank).send_signal(number)


def kill_node(slurm: Cluster, job: Job, node: str) -> None:
    """SIGKILL to a node's slurmd and to all that it has started for the job, its step daemon too."""
    slurm.kill(f"slurmd-{node}")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = _environ(process)
            if environment.get("SLURMD_NODENAME") == node and environment.get("SLURM_JOB_ID") == str(job.number):
                if "slurmstepd" in " ".join(process.parent().cmdline()):
                    process.parent().kill()
                process.kill()


SETTINGS = ("policy.tensor_parallel_size=2", "train.iterations=20")


def test_a_run_that_is_never_left_in_peace_plays_every_passage_once(slurm, recipe, tmp_path):
    """Two nodes of two ranks, tensor and pipeline parallel, then tensor and data parallel from the same checkpoints. In the first
    job few iterations are due for a checkpoint: most are made because the job was asked to end."""
    print(f"SPICE_KILLED_SEED={KILLED_SEED}")
    dice = random.Random(KILLED_SEED)
    run_dir = tmp_path / "run"
    job = Job(slurm, recipe, run_dir, *SETTINGS, "checkpoint.every=6", "cluster.timeout=60")
    job.sleep_until(lambda: len(job.iterations()) >= 2)
    urgent = slurm.client("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.sleep_until(lambda: job.restarts() == 1)
    job.sleep_until(lambda: slurm.job(urgent.strip())["JobState"] == "COMPLETED")
    before = len(job.iterations())
    job.sleep_until(lambda: len(job.iterations()) > before)
    slurm.client("scancel", "--batch", "--signal=USR1", str(job.number))  # as the end of the time limit announces itself
    job.sleep_until(lambda: job.restarts() == 2)
    further(job)
    victim = dice.randrange(4)
    signal_rank(job, victim, signal.SIGKILL)
    saved_up_to = checkpoint(run_dir)
    job.sleep_until(lambda: job.restarts() == 3 and job.iterations()[-1] >= saved_up_to + 2)
    slurm.client("scancel", str(job.number))
    job.end("CANCELLED")
    saved = sorted(path.name for path in run_dir.glob("checkpoints/*"))
    assert saved and not any(name.endswith(".partial") for name in saved), saved
    log = job.log.read_text()
    assert log.count("interrupted (SIGTERM)") + log.count("interrupted (SIGUSR1)") >= 2, log[-6000:]
    assert "Broken pipe" not in log, "a rank was aborted that had nothing left to do"
    first = rf"spice.sh: first cause: rank {victim} on n{1 + victim // 2} .* killed by SIGKILL; its log: .*/rank_{victim}.log"
    assert re.search(first, log), log[-6000:]

    _go_on_with_data_parallel_ranks_that_are_killed_stopped_and_lose_their_node(slurm, recipe, run_dir, dice.randrange(4))
    assert job.iterations() == list(range(1, 21))
    episodes = [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]
    sampler = PassageSampler(Corpus(recipe.parent / "corpus", TextTokenizer.from_dir(recipe.parent / "hf")), SEED)
    expected = [(number, passage.index) for number in range(1, 21) for passage in sampler.next(3)]
    assert [(episode["iteration"], episode["passage"]["index"]) for episode in episodes] == expected
    assert not ranks(run_dir), "something outlived the jobs"
    logs = rank_logs.read(run_dir)
    assert [(log.rank, log.host, log.state) for log in logs] == [(0, "n1", "ended"), (1, "n1", "ended"), (2, "n2", "ended"), (3, "n2", "ended")]
    assert min(log.attempts for log in logs) >= 8


def _go_on_with_data_parallel_ranks_that_are_killed_stopped_and_lose_their_node(
    slurm: Cluster, recipe: Path, run_dir: Path, victim: int
) -> None:
    job = Job(slurm, recipe, run_dir, *SETTINGS, "policy.pipeline_parallel_size=1", "checkpoint.every=1", "cluster.timeout=40")
    further(job)
    signal_rank(job, victim, signal.SIGKILL)
    job.sleep_until(lambda: job.restarts() == 1)
    further(job)
    signal_rank(job, 1, signal.SIGSTOP)
    job.sleep_until(lambda: job.restarts() == 2)
    log = job.log.read_text()
    assert "resumed from" in log and re.search(rf"first cause: rank {victim} on n{1 + victim // 2} .* killed by SIGKILL", log), job.story()
    assert re.search(r"the run hangs: .*rank 1 \(n1\) gives no sign of life: it has been in .*, stopped\)", log), job.story()
    assert re.search(r"spice.sh: first cause: rank \d on n\d .* Hang: the run hangs", log), job.story()
    further(job)
    kill_node(slurm, job, "n2")
    job.sleep_until(lambda: job.restarts() == 3)
    slurm.start_node("n2")
    # Slurm ends what is left of the lost start by the job's number, and the new start may be there by then: one more start.
    job.end("COMPLETED", seconds=480.0)


def test_a_grace_time_a_time_limit_and_a_first_node_whose_daemon_alone_is_killed(slurm, recipe, tmp_path):
    """Of the first its script hears nothing, in an iteration before which nothing was saved. The second passes before its ranks have
    ended: they are stopped. In the third the script and the ranks of the first node live on, and nobody can end them: Slurm gives
    the node up and requeues the job, which goes on when the node is back."""
    settings = (*SETTINGS[:1], "policy.pipeline_parallel_size=1", "train.iterations=1000", "checkpoint.every=1", "cluster.timeout=60")
    job = Job(slurm, recipe, tmp_path / "run", *settings, options=["--partition=graceful", "--signal=B:USR1@1"])
    job.sleep_until(lambda: "started: " in job.log.read_text() if job.log.is_file() else False)
    signal_rank(job, 1, signal.SIGSTOP)  # or the iteration would be over; Slurm sends SIGCONT before SIGTERM
    slurm.client("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.sleep_until(lambda: job.restarts() == 1)
    told = job.log.read_text()
    assert "interrupted (SIGTERM); the run had no finished iteration" in told and "spice.sh: requeued (restart 1)" in told, job.story()

    limit_minutes(job, "1")
    job.sleep_until(lambda: len(ranks(job.run_dir)) == 4)
    for rank in ranks(job.run_dir):
        rank.send_signal(signal.SIGSTOP)
    job.sleep_until(lambda: job.restarts() == 2)
    limit_minutes(job, "UNLIMITED")
    assert f"Time limit exhausted for JobId={job.number}" in (slurm.folder / "slurmctld.log").read_text(), job.story()

    further(job)
    slurm.kill("slurmd-n1")
    job.sleep_until(lambda: job.restarts() == 3)
    slurm.start_node("n1")
    further(job)
    further(job)
    slurm.client("scancel", str(job.number))
    job.end("CANCELLED")
    assert job.iterations() == list(range(1, job.iterations()[-1] + 1))
    assert not ranks(job.run_dir), "something outlived the job"


def test_srun_tells_its_tasks_while_the_controller_gives_no_answer(slurm, tmp_path):
    """So slurm/spice.sh passes the warning on, also when it comes while one controller takes over from another."""
    task = f"""trap 'touch {tmp_path}/told.$SLURM_NODEID; exit 0' USR1; touch {tmp_path}/began.$SLURM_NODEID; while :; do sleep 0.2; done"""
    words = ["srun", "--nodes=2", "--ntasks=2", "bash", "-c", task]
    script = f"#!/bin/bash\n{shlex.join(words)} &\necho $! >{tmp_path}/srun\nwait\n"
    number = slurm.client("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", input=script).strip()

    def are_there(pattern: str) -> bool:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob(pattern))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(list(tmp_path.glob(pattern))) == 2

    assert are_there("began.*"), slurm.ends_of_logs(2000)
    slurm.daemons["slurmctld"].send_signal(signal.SIGSTOP)
    try:
        os.kill(int((tmp_path / "srun").read_text()), signal.SIGUSR1)
        assert are_there("told.*")
    finally:
        slurm.daemons["slurmctld"].send_signal(signal.SIGCONT)
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED"


def limit_minutes(job: Job, minutes: str) -> None:
    job.slurm.client("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")


def further(job: Job) -> None:
    """Returns when the job has saved more than it has now."""
    before = checkpoint(job.run_dir)
    job.sleep_until(lambda: checkpoint(job.run_dir) > before)


def checkpoint(run_dir: Path) -> int:
    """The newest iteration that has a checkpoint."""
    return max((int(path.name.partition("_")[2]) for path in run_dir.glob("checkpoints/iteration_???????")), default=0)

"""`sbatch slurm/spice.sh` on a real Slurm with two nodes: the whole life of a job that is never left in peace.

The nodes are both this machine. Ranks, engines, checkpoints and requeueing are real; the model is tiny and random.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from slurm_cluster import ENDED, Cluster, why_not
from tiny_recipe import tiny_recipe

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.telemetry import rank_logs

ROOT = Path(__file__).resolve().parents[1]
SEED = 5
KILLED_SEED = int(os.environ.get("SPICE_KILLED_SEED", time.time_ns() % 1000))
"""Draws who is killed, stopped and lost, and when; printed, so that a failure can be had again."""
pytestmark = [pytest.mark.timeout(2400), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("job"))


def set_iterations(recipe: Path, number: int) -> None:
    """For jobs that start from now on."""
    told = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**told, "train": {**told["train"], "iterations": number}}))


class Job:
    """A submitted run; whatever waits for it fails with its log."""

    def __init__(self, slurm: Cluster, recipe: Path, run_dir: Path, *overrides: str, nodes: int = 2, options: Sequence[str] = ()):
        self.slurm, self.run_dir = slurm, run_dir
        self.log_before = 0  # so many characters of the log are of earlier starts
        environment = {"SPICE_VENV": str(Path(sys.prefix)), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        exports = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        self.number = int(slurm.client(
            "sbatch", "--parsable", f"--nodes={nodes}", f"--export={exports}", f"--output={run_dir}-%j.log", *options,
            str(ROOT / "slurm" / "spice.sh"), str(recipe), f"run.dir={run_dir}", *overrides, cwd=ROOT,
        ))  # fmt: skip
        self.log = Path(f"{run_dir}-{self.number}.log")

    def iterations(self) -> list[int]:
        return [line["iteration"] for line in json_lines(self.run_dir / "metrics.jsonl")]

    def told(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def sleep_until(self, condition: Callable[[], bool], seconds: float = 480.0) -> None:
        deadline = time.monotonic() + seconds
        for look in itertools.count():
            if condition():
                return
            assert time.monotonic() < deadline, self.story()
            assert look % 10 or self.slurm.job(self.number)["JobState"] not in ENDED, self.story()
            time.sleep(0.2)

    def tells(self, pattern: str) -> None:
        """Returns when this start's part of the log has it."""
        self.sleep_until(lambda: re.search(pattern, self.told()[self.log_before :], re.DOTALL) is not None)

    def plays(self) -> None:
        """Returns when this start has finished an iteration."""
        self.tells(r" ready after .*iteration \d+/\d+ \|")

    def goes_further(self) -> None:
        """Returns when this start has saved an iteration."""
        self.tells(rf" ready after .*saved {re.escape(str(self.run_dir))}/checkpoints/iteration_")

    @contextlib.contextmanager
    def requeued(self) -> Iterator[None]:
        """Returns when what is done in the block has had the job requeued."""
        before = self.restarts()
        yield
        self.sleep_until(lambda: self.restarts() > before)
        self.log_before = len(self.told())

    def end(self, state: str, seconds: float = 480.0) -> None:
        ended = self.slurm.wait(self.number, *ENDED, seconds=seconds)
        assert ended["JobState"] == state, self.story()

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def story(self) -> str:
        return "\n".join([self.told()[-6000:], *self.slurm.ends_of_logs(1000), str(self.slurm.job(self.number))])


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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
    """SIGKILL to a node's slurmd and to all that it has started for the job, its step daemons too."""
    slurm.kill(f"slurmd-{node}")
    lost = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = _environ(process)
            if environment.get("SLURMD_NODENAME") == node and environment.get("SLURM_JOB_ID") == str(job.number):
                lost += [parent for parent in [process.parent()] if parent is not None and "slurmstepd" in " ".join(parent.cmdline())]
                lost.append(process)
    for process in lost:  # together: what lives on must not see the rest go
        with contextlib.suppress(psutil.Error):
            process.kill()


# One deterministic run in float32 whose updates change what is played next: a random model's tasks are never valid, so that without the
# bonus all gradients would be zero.
SETTINGS = (
    "policy.tensor_parallel_size=2", "rollout.deterministic=true", "policy.entropy_bonus=0.01", "policy.learning_rate=1e-3",
    "telemetry.tensorboard=false",
)  # fmt: skip
DATA_PARALLEL = (*SETTINGS, "policy.pipeline_parallel_size=1", "checkpoint.every=1", "checkpoint.keep=3")


def test_a_run_that_is_never_left_in_peace_plays_every_passage_once(slurm, recipe, tmp_path):
    """Two nodes of two ranks, tensor and pipeline parallel, then tensor and data parallel from the same checkpoints. In the first
    job few iterations are due for a checkpoint: most are made because the job was asked to end. In one of the two a rank is killed.
    At last one node of four ranks goes on from a checkpoint of theirs."""
    print(f"SPICE_KILLED_SEED={KILLED_SEED}")
    dice = random.Random(KILLED_SEED)
    run_dir, killed_in_first, victim = tmp_path / "run", dice.random() < 0.5, dice.randrange(4)
    set_iterations(recipe, 1000)
    job = Job(slurm, recipe, run_dir, *SETTINGS, "checkpoint.every=6", "cluster.timeout=60")
    job.sleep_until(lambda: len(job.iterations()) >= 2)
    with job.requeued():
        urgent = submit_urgent(slurm)
        slurm.wait(urgent, "COMPLETED")  # the job has left the nodes
    assert_saved(job, "SIGTERM")
    job.plays()
    with job.requeued():
        slurm.client("scancel", "--batch", "--signal=USR1", str(job.number))  # as the end of the time limit announces itself
    assert_saved(job, "SIGUSR1")
    if killed_in_first:
        kill_rank(job, victim)
    job.plays()
    slurm.client("scancel", str(job.number))
    job.end("CANCELLED")
    assert_saved(job, "SIGTERM")
    saved = sorted(path.name for path in run_dir.glob("checkpoints/*"))
    assert saved and not any(name.endswith(".partial") for name in saved), saved
    assert "Broken pipe" not in job.told(), "a rank was aborted that had nothing left to do"

    _go_on_with_data_parallel_ranks(slurm, recipe, run_dir, dice, None if killed_in_first else victim)
    numbers = job.iterations()
    assert numbers == list(range(1, numbers[-1] + 1))
    sampler = PassageSampler(Corpus(recipe.parent / "corpus", TextTokenizer.from_dir(recipe.parent / "hf")), SEED)
    expected = [(number, passage.index) for number in numbers for passage in sampler.next(3)]
    assert [(episode["iteration"], episode["passage"]["index"]) for episode in json_lines(run_dir / "episodes.jsonl")] == expected
    assert not ranks(run_dir), "something outlived the jobs"
    logs = rank_logs.read(run_dir)
    assert [(log.rank, log.host, log.state) for log in logs] == [(rank, f"n{1 + rank // 2}", "ended") for rank in range(4)]
    assert min(log.attempts for log in logs) >= 9

    _play_the_last_two_iterations_again_on_one_node(slurm, recipe, run_dir, tmp_path / "one")


def _go_on_with_data_parallel_ranks(slurm: Cluster, recipe: Path, run_dir: Path, dice: random.Random, victim: int | None) -> None:
    """One is killed (unless `victim` is None), one stopped, a node lost, a time limit reached, and then the first node's daemon alone
    is killed: the script and the ranks there live on, and nobody can end them. Slurm gives the node up and requeues the job, which
    goes on when the node is back, and comes to its end."""
    job = Job(slurm, recipe, run_dir, *DATA_PARALLEL, "cluster.timeout=40", options=["--signal=B:USR1@1"])
    job.goes_further()
    assert "resumed from" in job.told() and "; 2 engine(s), " in job.told(), job.story()
    if victim is not None:
        kill_rank(job, victim)
        job.goes_further()
    stopped = dice.randrange(4)
    with job.requeued():
        signal_rank(job, stopped, signal.SIGSTOP)
    silent = rf"the run hangs: .*rank {stopped} \(n{1 + stopped // 2}\) gives no sign of life: it has been in .*, stopped\)"
    assert re.search(silent, job.told()), job.story()
    assert re.search(r"spice.sh: first cause: rank \d on n\d .* Hang: the run hangs", job.told()), job.story()

    job.goes_further()
    lost = dice.choice(slurm.nodes)
    with job.requeued():
        kill_node(slurm, job, lost)
    slurm.start_node(lost)

    # Slurm ends what is left of the lost start by the job's number, and the new start may be there by then: one more start.
    job.goes_further()
    with job.requeued():
        for rank in ranks(run_dir):  # or there were many more iterations until Slurm looks; it sends SIGCONT before SIGTERM
            rank.send_signal(signal.SIGSTOP)
        limit_minutes(job, "1")
    limit_minutes(job, "UNLIMITED")
    assert f"Time limit exhausted for JobId={job.number}" in (slurm.folder / "slurmctld.log").read_text(), job.story()

    job.goes_further()
    with job.requeued():
        slurm.kill("slurmd-n1")
    set_iterations(recipe, job.iterations()[-1] + 5)  # what lives on may come a little further
    slurm.start_node("n1")
    job.end("COMPLETED")


def _play_the_last_two_iterations_again_on_one_node(slurm: Cluster, recipe: Path, run_dir: Path, again: Path) -> None:
    """Which ranks share a node decides which engine plays what, and who sends and gets its weights; not what is played and learnt."""
    through = json_lines(run_dir / "metrics.jsonl")
    last = through[-1]["iteration"]
    before = f"checkpoints/iteration_{last - 2:07d}"
    shutil.copytree(run_dir / before, again / before)
    job = Job(slurm, recipe, again, *DATA_PARALLEL, f"train.iterations={last}", "cluster.ranks_per_node=4", nodes=1)
    job.end("COMPLETED")
    assert f"resumed from {again / before}: TP=2" in job.told() and "; 1 engine(s), " in job.told(), job.story()
    found = json_lines(again / "metrics.jsonl")
    assert [line["iteration"] for line in found] == [last - 1, last]
    assert played(again) == [episode for episode in played(run_dir) if episode[0] > last - 2]
    for name in ("policy/loss", "policy/grad_norm"):
        here, there = [line[name] for line in found], [line[name] for line in through[-2:]]
        assert here == pytest.approx(there, rel=1e-4, abs=0), name
        assert 0.0 not in here and here[0] != here[1], "each iteration has learnt something else"
    assert not ranks(again)


def played(run_dir: Path) -> list[tuple[int, int, list[str]]]:
    lines = json_lines(run_dir / "episodes.jsonl")
    return [(line["iteration"], line["passage"]["index"], [attempt["text"] for attempt in line["attempts"]]) for line in lines]


def test_a_grace_time_in_an_iteration_before_which_nothing_was_saved(slurm, recipe, tmp_path):
    """The script hears nothing of it."""
    settings = (*DATA_PARALLEL, "train.iterations=1000", "cluster.timeout=60")
    job = Job(slurm, recipe, tmp_path / "run", *settings, options=["--partition=graceful"])
    job.tells("started: ")
    with job.requeued():
        signal_rank(job, 1, signal.SIGSTOP)  # or the iteration would be over; Slurm sends SIGCONT before SIGTERM
        submit_urgent(slurm)
    told = job.told()
    assert "interrupted (SIGTERM); the run had no finished iteration" in told and "spice.sh: requeued (restart 1)" in told, job.story()
    slurm.client("scancel", str(job.number))
    job.end("CANCELLED")
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


def submit_urgent(slurm: Cluster) -> str:
    """A job that takes both nodes from whoever has them; its number."""
    command = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    return slurm.client(*command).strip()


def limit_minutes(job: Job, minutes: str) -> None:
    job.slurm.client("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")


def kill_rank(job: Job, victim: int) -> None:
    """SIGKILL to a rank, when the job has saved; returns when it is requeued and has told who it was."""
    job.goes_further()
    with job.requeued():
        signal_rank(job, victim, signal.SIGKILL)
    first = rf"spice.sh: first cause: rank {victim} on n{1 + victim // 2} .* killed by SIGKILL; its log: .*/rank_{victim}.log"
    assert re.search(first, job.told()), job.story()


def assert_saved(job: Job, reason: str) -> None:
    """The last end was in order, by this signal, and all that was logged until then is saved."""
    ends = re.findall(r"interrupted \((\w+)\); the run is saved up to iteration (\d+) in", job.told())
    last = str(job.iterations()[-1])
    assert ends and ends[-1] == (reason, last), job.story()
    assert (job.run_dir / "checkpoints" / f"iteration_{last:0>7}" / "run_state.json").is_file(), job.story()

"""What slurm/*.sh start, in every way they may be called, compared with tests/snapshots."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from recorded_commands import SNAPSHOTS, Recorder, assert_as_before

from megatron_spice import plan
from megatron_spice.config.schema import Config

CPU = {"SPICE_RANKS_PER_NODE": "2", "SPICE_DEVICE_KIND": "cpu", "SPICE_RUN_DIR": "runs/my run", "SPICE_TUNABLES": "a.tunable=1"}
CUDA = CPU | {"SPICE_RANKS_PER_NODE": "8", "SPICE_DEVICE_KIND": "cuda"}
JOB = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
TWO = JOB | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
AGAIN = {"SLURM_RESTART_COUNT": "1"}
FURTHER = {"STATUS": "1", "CHECKPOINT": "iteration_0000001"}
ENDED = {"STATUS": "137", "ENDED": "job 41234 restart 0"}
LIMIT = {"SIGNALS": "USR1 TERM", "STATUS": "75", "SHOWN": "JobState=COMPLETING Reason=TimeLimit", "AWAITED": "requeue"}
GONE = LIMIT | {"SHOWN": "JobState=COMPLETING Reason=None", "AWAITED": "job"}
TWICE = "mkdir -p 'runs/my run' && printf 'job 41234 at \\n%.0s' 1 2 >'runs/my run/warned_at'\n"
APPTAINER = {"SPICE_CONTAINER": "slurm/spice.sh", "SPICE_VENV": "../venv", "SPICE_MOUNTS": "/scratch:/scratch"}
ODD = ["a recipe.yaml", "run.dir=runs/my run", "rollout.engines=[http://a:1,http://b:2]", "corpus.weights={a: 0.5}", "policy.model=it's $HOME"]
SITE = 'export SPICE_CONTAINER=registry/image:1 SPICE_MOUNTS=/scratch:/scratch NCCL_IB_HCA=mlx5 SPICE_SCRATCH="${PWD%/house}/local node"\n'
DONE = "mkdir -p out.tasks/0000{0,1} && touch out.tasks/0000{0,1}/manifest.json\n"
CORPUS = ["in put.jsonl", "--tokenizer", "hf", "--output", "out"]
ARRAY = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_ID": "2"}

# name -> what launch-env answers, script, arguments, environment, site file
CASES = {
    "spice-alone-cpu": (CPU, "slurm/spice.sh", ["recipe.yaml"], {}, ""),
    "spice-alone-cuda": (CUDA, "slurm/spice.sh", ["recipe.yaml"], {}, ""),
    "spice-alone-own-threads": (CPU, "slurm/spice.sh", ["recipe.yaml"], {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"}, ""),
    "spice-dry-run": (CPU, "slurm/spice.sh", ["--dry-run", "--nodes=2", "recipe.yaml"], {}, ""),
    "spice-one-node": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB, ""),
    "spice-two-nodes-odd-words": (CUDA, "slurm/spice.sh", ODD, TWO, ""),
    "spice-two-nodes-unresolved": (CPU, "slurm/spice.sh", ["recipe.yaml"], TWO | {"UNRESOLVED": "yes"}, ""),
    "spice-two-nodes-failed": (CPU, "slurm/spice.sh", ["recipe.yaml"], TWO | {"STATUS": "1"}, ""),
    "spice-two-nodes-failed-later": (CPU, "slurm/spice.sh", ["recipe.yaml"], TWO | {"STATUS": "1", "CHECKPOINT": "iteration_0000001"}, ""),
    "spice-two-nodes-saved-and-ended": (CPU, "slurm/spice.sh", ["recipe.yaml"], TWO | {"STATUS": "75"}, ""),
    "spice-warned": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | {"SIGNALS": "USR1", "STATUS": "75"}, ""),
    "spice-out-of-time-while-saving": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | LIMIT, ""),
    "spice-cancelled-after-the-warning": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | GONE, ""),
    "spice-again": (CUDA, "slurm/spice.sh", ["recipe.yaml", "checkpoint.resume=never"], JOB | AGAIN, ""),
    "spice-requeued-already": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | AGAIN | FURTHER | {"SHOWN": "JobId=41234 Restarts=2"}, ""),
    "spice-folder-lost": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | FURTHER | {"OWNER": "job 41235 restart 0"}, ""),
    "spice-cannot-be-warned-by-slurm": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | {"SIGNALS": "USR1", "STATUS": "75", "FAILING": "scancel"}, ""),
    "spice-warned-before-ranks": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | {"EARLY": "USR1"}, ""),
    "spice-third-limit": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | {"SIGNALS": "USR1", "STATUS": "75"}, TWICE),
    "spice-third-limit-before-ranks": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | {"EARLY": "USR1"}, TWICE),
    "spice-third-limit-while-saving": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | LIMIT | {"AWAITED": "job"}, TWICE),
    "spice-two-nodes-ended-and-killed": (CPU, "slurm/spice.sh", ["recipe.yaml"], TWO | ENDED, ""),
    "spice-ended-before-ranks": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | {"EARLY": "TERM"}, ""),
    "spice-taken-back-at-last": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | FURTHER | {"REFUSALS": "2"}, ""),
    "spice-not-to-be-requeued": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | FURTHER | {"SHOWN": "Requeue=0 Restarts=0 BatchFlag=1"}, ""),
    "spice-no-answer-from-slurm": (CUDA, "slurm/spice.sh", ["recipe.yaml"], JOB | FURTHER | {"REFUSALS": "99"}, ""),
    "spice-exports-none": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | {"SLURM_EXPORT_ENV": "NONE"}, ""),
    "spice-apptainer": (CUDA, "slurm/spice.sh", ["recipe.yaml"], TWO | APPTAINER | {"STATUS": "1"}, ""),
    "spice-alone-apptainer": (CPU, "slurm/spice.sh", ["recipe.yaml"], APPTAINER, ""),
    "spice-pyxis-site-file": (CUDA, "slurm/spice.sh", ODD, TWO, SITE),
    "spice-apptainer-no-scratch": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | APPTAINER | {"SPICE_SCRATCH": "/dev/null/scratch"}, ""),
    "spice-pyxis-failed": (CPU, "slurm/spice.sh", ["recipe.yaml"], JOB | {"STATUS": "1", "SPICE_CONTAINER": "/images/spice.sqsh"}, ""),
    "spice-pyxis-dry-run-without-a-job": (CPU, "slurm/spice.sh", ["--dry-run", "recipe.yaml"], {}, SITE),
    "preprocess-alone": (CPU, "slurm/preprocess.sh", CORPUS, {}, ""),
    "preprocess-tasks-here": (CPU, "slurm/preprocess.sh", CORPUS, {"SPICE_TASKS": "2"}, ""),
    "preprocess-trailing-slash": (CPU, "slurm/preprocess.sh", [*CORPUS[:-1], "out//"], {"SPICE_TASKS": "2"}, DONE),
    "preprocess-array": (CPU, "slurm/preprocess.sh", CORPUS, JOB | ARRAY, ""),
    "preprocess-apptainer": (CPU, "slurm/preprocess.sh", CORPUS, JOB | {"SPICE_CONTAINER": "slurm/spice.sh"}, ""),
    "preprocess-pyxis-site-file": (CPU, "slurm/preprocess.sh", CORPUS, JOB | ARRAY, SITE),
}


@pytest.mark.parametrize("name", CASES)
def test_a_script_starts_what_it_did(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    answer, script, arguments, more, site = CASES[name]
    recorder = Recorder(tmp_path, answer)
    if site:
        (recorder.house / "slurm" / "site.sh").write_text(site)
    assert_as_before(name, recorder.story(script, arguments, **more), request.config.getoption("--rewrite-snapshots"))


def test_a_file_system_that_has_died_ends_the_job_without_another_start(tmp_path: Path) -> None:
    """It answers before the ranks start, and not when they have failed."""
    recorder = Recorder(tmp_path, CPU)
    script, find = recorder.house / "slurm" / "requeue.sh", recorder.programs / "find"
    script.write_text(script.read_text().replace("timeout 60", "timeout 1"))
    find.write_text(f'#!/bin/sh\n[ -e "{tmp_path}/answered" ] && exec /bin/sleep 30\ntouch "{tmp_path}/answered"\n')
    find.chmod(0o755)
    began = time.monotonic()
    story = recorder.story("slurm/spice.sh", ["recipe.yaml"], **JOB, STATUS="1")
    assert time.monotonic() - began < 20
    assert story.rstrip().endswith("exit code 1") and "requeue" not in story, story
    assert "gives no answer" in recorder.story("slurm/spice.sh", ["recipe.yaml"], **JOB), "and it is told where it is dead before"


def test_a_start_that_is_killed_before_it_came_further_is_requeued_once(tmp_path: Path) -> None:
    """At each checkpoint; and a run that fails by itself is not."""
    recorder = Recorder(tmp_path, CPU)
    mine = {**JOB, "OWNER": "job 41234 restart 0"}

    def is_requeued(**ends: str) -> bool:
        return "scontrol requeue 41234" in recorder.story("slurm/spice.sh", ["recipe.yaml"], **mine, **ends)

    assert not is_requeued(STATUS="1")
    assert not is_requeued(STATUS="137", NOTE="job 41234 restart 0"), "that was srun, because a rank of another node had failed"
    assert is_requeued(STATUS="137", NOTE="job 41233 restart 0") and not is_requeued(STATUS="137")
    assert is_requeued(STATUS="137", CHECKPOINT="iteration_0000001"), "it has come further"
    assert is_requeued(STATUS="137") and not is_requeued(STATUS="137")
    assert is_requeued(STATUS="76", CHECKPOINT="iteration_0000002") and is_requeued(STATUS="76") and not is_requeued(STATUS="76")


def test_an_orderly_end_on_one_node_is_one_on_all(tmp_path: Path) -> None:
    """Slurm has killed the other nodes' launchers: any number of times. Not where ranks had failed, or it was another start's word."""
    recorder = Recorder(tmp_path, CPU)
    ended = {**TWO, **ENDED, "OWNER": "job 41234 restart 0"}

    def exit_code(**more: str) -> tuple[bool, str]:
        story = recorder.story("slurm/spice.sh", ["recipe.yaml"], **ended, **more)
        return "scontrol requeue 41234" in story, story.splitlines()[-1]

    assert [exit_code(), exit_code()] == [(True, "exit code 75")] * 2
    assert exit_code(**AGAIN) == (True, "exit code 137") and exit_code(**AGAIN) == (False, "exit code 137")
    assert exit_code(NOTE="job 41234 restart 0") == (False, "exit code 137")


def test_the_third_time_limit_without_a_saved_iteration_is_the_last(tmp_path: Path) -> None:
    """What counts is the end of the time limit, not a warning before a preemption; and a job of its own counts anew."""
    recorder = Recorder(tmp_path, CPU)

    def is_requeued(**more: str) -> bool:
        environment = {**JOB, "SIGNALS": "USR1", "STATUS": "75", "OWNER": "job 41234 restart 0", **more}
        story = recorder.story("slurm/spice.sh", ["recipe.yaml"], **environment)
        return f"scontrol requeue {environment['SLURM_JOB_ID']}" in story

    far, near = str(int(time.time()) + 40_000), str(int(time.time()) + 100)
    assert is_requeued(SLURM_JOB_END_TIME=near) and all(is_requeued(SLURM_JOB_END_TIME=far) for _ in range(3))
    assert is_requeued(SLURM_JOB_END_TIME=near) and not is_requeued(SLURM_JOB_END_TIME=near)
    assert is_requeued(SLURM_JOB_END_TIME=far) and is_requeued(SLURM_JOB_ID="41235", OWNER="job 41235 restart 0")
    assert is_requeued(CHECKPOINT="iteration_0000001"), "it has come further"
    assert is_requeued(EARLY="USR1") and is_requeued() and not is_requeued()


def test_a_check_without_an_answer_ends_the_job_and_a_terminals_ctrl_c_ends_the_check(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, CPU)
    python, script = tmp_path / "venv" / "bin" / "python", recorder.house / "slurm" / "spice.sh"
    python.unlink()
    python.write_text(f'#!/bin/bash\necho $$ >"{tmp_path}/asked"\nexec /bin/sleep 100\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SPICE_VENV": str(tmp_path / "venv")}
    # `env`, for whoever runs the tests in the background has them ignore it
    command = ["env", "--default-signal=INT", "bash", str(script), "recipe.yaml"]
    alone = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "asked").exists() and (tmp_path / "asked").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(alone.pid, signal.SIGINT)
    try:
        alone.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "asked").read_text()), signal.SIGKILL)
    assert alone.returncode != 0
    script.write_text(script.read_text().replace("timeout --foreground -k 30 1800 ", "timeout --foreground -k 30 1 "))
    told = recorder.story("slurm/spice.sh", ["recipe.yaml"], **JOB)
    assert "the check of the recipe gave no answer (124)" in told and told.rstrip().endswith("exit code 1"), told


@pytest.mark.parametrize(("device", "case"), [("cuda", "spice-two-nodes-odd-words"), ("cpu", "spice-two-nodes-unresolved")])
def test_who_starts_nodes_by_hand_is_told_to_set_what_the_script_sets(device: str, case: str) -> None:
    """But for what only keeps the output quiet, and what the repository's folder makes needless."""
    needless = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL", "PET_NODE_RANK", "SLURM_NODEID"}
    lines = [line.strip() for line in (SNAPSHOTS / f"{case}.txt").read_text().splitlines() if line.startswith("    ")]
    script = {name: value for name, _, value in (line.partition("=") for line in lines) if name not in needless}
    recipe = {"run": {"dir": "runs/my run"}, "corpus": {"path": "corpus"}, "policy": {"model": "model"}, "cluster": {"device": device}}
    told = {name: shlex.quote(value) for name, value in plan._environment(Config.model_validate(recipe)).items()}
    assert set(told) == set(script)
    of_the_machine = ("OMP_NUM_THREADS", "GLIBC_TUNABLES")  # which the recorder's stand-ins answer for
    assert [(name, told[name]) for name in told if name not in of_the_machine and told[name] != script[name]] == []


def test_every_snapshot_belongs_to_a_case() -> None:
    ours = {path.stem for path in SNAPSHOTS.glob("*.txt") if path.stem.startswith(("spice-", "preprocess-"))}
    assert ours == set(CASES)

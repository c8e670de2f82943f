"""slurm/spice.sh as a launcher: real torchrun ranks, in a copy of the house whose `train` only says where it is.

`srun` and `scontrol` are recorded, not run: here it matters what they are asked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from megatron_spice.cluster.host_memory import TUNABLES
from megatron_spice.plan import PORT

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipe.yaml"

TRAIN = '''
import os, pathlib, sys, time
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "SPICE_RUN_DIR")
def train(config):
    folder = pathlib.Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name}={os.environ.get(name)}\\n" for name in NAMES) + f"pid={os.getpid()}\\nsteps={config.train.iterations}\\n"
    partial = folder / f"partial{os.environ['RANK']}"
    partial.write_text(text)
    partial.rename(folder / f"rank{os.environ['RANK']}.txt")
    if config.train.seed == 1:
        time.sleep(300)
    if config.train.seed == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("no such\\ntoken")
    if config.train.seed == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    if config.train.seed in (3, 4):
        time.sleep(1)
        raise RuntimeError("Connection closed by peer")
    sys.exit(3 if config.train.seed == 2 else 0)
'''


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house with the launcher, the real command line, a model and a corpus that pass the checks."""
    for folder in ("config", "cluster", "telemetry"):
        shutil.copytree(ROOT / "megatron_spice" / folder, tmp_path / "megatron_spice" / folder)
    for room in ("policy", "rollout", "cost", "checkpoint"):  # a plan, and whose the folder is
        shutil.copytree(ROOT / "megatron_spice" / room, tmp_path / "megatron_spice" / room)
    for path in (ROOT / "megatron_spice").glob("*.py"):
        shutil.copy(path, tmp_path / "megatron_spice")
    (tmp_path / "megatron_spice" / "train.py").write_text(TRAIN)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "model").mkdir()
    model = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    model |= {"num_attention_heads": 2, "max_position_embeddings": 8192}
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text('{"tokenizer": {"vocab_size": 9}, "options": {"max_tokens": 9}}')
    recipe = {"run": {"dir": "run"}, "corpus": {"path": "corpus"}, "policy": {"model": "model"}}
    recipe |= {"cluster": {"ranks_per_node": 2, "device": "cpu"}, "game": {"prompt_style": "few_shot"}}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(recipe))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    drop = ("SLURM_", "OMP_", "GOMP_", "PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    venv = Path(sys.executable).parent.parent
    return {**clean, "SPICE_VENV": str(venv), **more}


def launch(house: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "slurm/spice.sh", *arguments]
    return subprocess.run(command, cwd=house, env=environment(**more), capture_output=True, text=True, timeout=180, check=False)


def facts(house: Path, rank: int, run_dir: str = "run") -> dict[str, str]:
    return dict(line.split("=", 1) for line in (house / run_dir / f"rank{rank}.txt").read_text().splitlines())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds: float = 90.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def sleeping(house: Path) -> Iterator[subprocess.Popen]:
    """A launched job whose two ranks wait."""
    command = ["bash", "slurm/spice.sh", RECIPE, "train.seed=1"]
    with subprocess.Popen(command, cwd=house, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True) as job:
        try:
            assert wait_until(lambda: all((house / "run" / f"rank{rank}.txt").exists() for rank in (0, 1)))
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def test_every_rank_runs_with_its_place_and_quiet_threads(house):
    done = launch(house, RECIPE, "train.iterations=5")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = facts(house, rank)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (str(rank), "2", str(rank))
        assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"], found["steps"]) == ("PASSIVE", "10000", "5")
        assert found["GLIBC_TUNABLES"] == TUNABLES
        assert int(found["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.parametrize(
    ("seed", "story", "cause"),
    [
        (2, "ended with exit code 3", None),
        (3, "failed:\nRuntimeError: no such\ntoken\n", "RuntimeError: no such token; its log: run/logs/rank_1.log"),
        (4, "was killed by SIGKILL", "killed by SIGKILL; its log: run/logs/rank_1.log"),
    ],
)
def test_a_failing_rank_is_a_failing_job_and_its_last_line_says_who_and_why(house, seed, story, cause):
    """Also where ranks that lost it fail beside it."""
    done = launch(house, RECIPE, f"train.seed={seed}")
    assert done.returncode == 1, done.stderr
    said = done.stderr[done.stderr.index("spice: ") :]
    assert story in said and len(said.splitlines()) <= 5, done.stderr
    if cause is not None:
        last = said.splitlines()[-1]
        assert last.startswith("spice: first cause: rank 1 on ") and last.endswith(cause)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([RECIPE, "train.itertions=5"], "train.iterations"),
        ([RECIPE, "policy.pipeline_parallel_size=3"], "does not divide the 2 ranks"),
        (["nothing.yaml"], "nothing.yaml is not a file"),
        ([], "usage"),
    ],
)
def test_a_wrong_start_ends_with_2_and_starts_nothing(house, arguments, part):
    done = launch(house, *arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert not (house / "run").exists()


def test_a_dry_run_says_what_would_start_and_starts_nothing(house):
    done = launch(house, "--dry-run", "--nodes=2", RECIPE, "policy.pipeline_parallel_size=4", "run.dir=a b")
    assert done.returncode == 0, done.stderr
    assert "sbatch --nodes=2 slurm/spice.sh recipe.yaml policy.pipeline_parallel_size=4 'run.dir=a b'" in done.stdout
    for line in ("#SBATCH --requeue", "#SBATCH --mem=0", "#SBATCH --signal=B:USR1@180", "# Memory in GiB", "TP=1 PP=4 DP=1"):
        assert line in done.stdout
    assert not (house / "a b").exists()
    wrong = launch(house, "--dry-run", "--nodes=2", RECIPE, "policy.pipeline_parallel_size=3")
    assert wrong.returncode == 2 and "does not divide the 4 ranks" in wrong.stderr


def test_nodes_are_started_by_hand_with_what_the_plan_says(house):
    """Two launchers on this machine, which meet on loopback, each by the plan's own words."""
    settings = ["policy.pipeline_parallel_size=4", "run.dir=by hand"]
    said = launch(house, "--dry-run", "--nodes=2", RECIPE, *settings).stdout
    command = said[said.index("PET_NODE_RANK=I ") :].partition("\n\n")[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = command.replace("FIRST", "127.0.0.1").replace(f"={PORT}", f"={free.getsockname()[1]}")

    def start(node: int) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", command.replace("=I ", f"={node} ")]
        around = environment(GLOO_SOCKET_IFNAME="lo")
        return subprocess.run(words, cwd=house, env=around, capture_output=True, text=True, timeout=180, check=False)

    with ThreadPoolExecutor() as nodes:
        for done in nodes.map(start, (0, 1)):
            assert done.returncode == 0, done.stderr
    ranks = [facts(house, rank, "by hand") for rank in range(4)]
    assert [(found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) for found in ranks] == [
        ("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4"),
    ]  # fmt: skip
    assert {(found["SPICE_RUN_DIR"], found["GLIBC_TUNABLES"]) for found in ranks} == {("by hand", TUNABLES)}


def test_without_an_environment_it_names_install_sh(house):
    done = launch(house, RECIPE, SPICE_VENV="/nowhere")
    assert done.returncode == 1
    assert "install.sh" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_ranks_too(house, sleeping, how):
    """SIGTERM reaches the launcher, which passes it on; nobody hands SIGKILL on, there the kernel does it."""
    pids = [int(facts(house, rank)["pid"]) for rank in (0, 1)]
    assert all(map(alive, pids))
    sleeping.send_signal(how)
    assert sleeping.wait(60) != 0
    assert wait_until(lambda: not any(map(alive, pids)), 30)


RUN = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@" >>"$CALLS"
case "$*" in *megatron_spice.launch*) exit 7 ;; esac
while [ "${1#*/bin/python}" = "$1" ]; do shift; done
exec "$@"
"""


def slurm_tools(folder: Path) -> Path:
    """An `srun` and an `apptainer` that write down how they were called; what only checks the recipe they run, of ranks they say 7."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    (tools / "srun").write_text(RUN)
    (tools / "apptainer").write_text(RUN)
    for path in tools.iterdir():
        path.chmod(0o755)
    return tools


def test_inside_slurm_one_task_a_node_runs_torchrun(house, tmp_path):
    calls = tmp_path / "calls"
    tools = slurm_tools(tmp_path)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "10123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = launch(house, RECIPE, "policy.pipeline_parallel_size=4", PATH=path, CALLS=str(calls), **job)
    assert done.returncode == 7, done.stderr
    asked = calls.read_text().splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nnodes=2", "--nproc-per-node=2"} <= set(asked)
    assert "--master-addr=node1" in asked and "--master-port=20123" in asked
    assert asked[-3:] == ["train", RECIPE, "policy.pipeline_parallel_size=4"]


def test_a_container_for_apptainer_or_pyxis(house, tmp_path):
    calls, image = tmp_path / "calls", tmp_path / "image.sif"
    image.touch()
    more = {"PATH": f"{slurm_tools(tmp_path)}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    more |= {"SLURM_JOB_ID": "10123", "SLURM_JOB_NODELIST": "node1"}
    mounts = f"{house}:{house},{sys.prefix}:{sys.prefix}"
    assert launch(house, RECIPE, SPICE_CONTAINER=str(image), **more).returncode == 7
    contained = "\n".join(["apptainer", "exec", "--nv", "--bind", mounts, str(image)])
    asked = calls.read_text()
    assert asked.count(contained) == 3, "to check the recipe, for the ranks of the step, and to see who failed"
    assert asked.startswith("apptainer\n") and asked.count("srun\n") == 1
    calls.unlink()
    (house / "slurm" / "site.sh").write_text("export SPICE_CONTAINER=registry/image:1 SPICE_MOUNTS=/scratch\n")
    assert launch(house, RECIPE, **more).returncode == 7
    asked = calls.read_text().splitlines()
    assert asked.count("srun") == asked.count("--container-image=registry/image:1") == 3 and "apptainer" not in asked
    assert asked.count(f"--container-mounts={mounts},/scratch") == 3
    wrong = launch(house, RECIPE, "train.itertions=5", **more)
    assert wrong.returncode == 2 and "train.iterations" in wrong.stderr, "which is said in the container"
    assert "SPICE_SITE=/nowhere" in launch(house, RECIPE, SPICE_SITE="/nowhere", **more).stderr


def test_a_batch_copy_of_the_script_finds_the_house(house, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(house / "slurm" / "spice.sh", spool / "slurm_script")
    tools = slurm_tools(tmp_path)
    more = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "1"}
    more |= {"SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(house)}
    command = ["bash", str(spool / "slurm_script"), RECIPE]
    done = subprocess.run(command, cwd=house, env=environment(**more), capture_output=True, timeout=60, check=False)
    assert done.returncode == 7


@pytest.mark.parametrize("script", sorted([*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]), ids=str)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_scripts_are_clean():
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([SHELLCHECK, *map(str, scripts)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout

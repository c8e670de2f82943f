"""The command line as its users meet it: a process, its exit code, and what stands on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from published_shapes import add_corpus

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "examples/quickstart.yaml"


MODEL = {
    "model_type": "llama", "num_hidden_layers": 5, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 403, "max_position_embeddings": 4096,
}  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_spice", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", ["train", "plan", "launch-env", "config"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.itertions=2", ["train.itertions=2", "train.iterations"]),
        ("policy.precision=int3", ["policy.precision=int3", "fp32, bf16"]),
    ],
)
def test_a_wrong_recipe_ends_with_2_and_says_what_to_do(command, override, parts):
    done = run(command, QUICKSTART, override)
    assert done.returncode == 2
    assert done.stdout == ""
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_recipe_is_refused_before_torch_is_imported():
    code = (
        "import sys; from megatron_spice.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'transformers', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", QUICKSTART, "policy.precision=int3"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize("arguments", [
    ["--nodes=3", QUICKSTART, "train.iterations=3", "train.passages=6"], [QUICKSTART, "--nodes=3", "train.iterations=3", "train.passages=6"],
    [QUICKSTART, "train.iterations=3", "--nodes", "3", "train.passages=6"], [QUICKSTART, "train.iterations=3", "train.passages=6", "--nodes=3"],
])  # fmt: skip
def test_settings_may_stand_before_and_behind_options(arguments):
    done = run("plan", *arguments)
    assert f"sbatch --nodes=3 slurm/spice.sh {QUICKSTART} train.iterations=3 train.passages=6\n" in done.stdout, done.stderr
    refused = run("launch-env", *arguments, "corpus.path=missing").stderr
    assert refused.count("problem") == 1 and "unrecognized" not in refused


def test_an_option_that_there_is_not_is_refused():
    done = run("plan", QUICKSTART, "--node=3", "--noodles=3", "train.iterations=3")
    assert done.returncode == 2 and done.stderr.rstrip().endswith("unrecognized arguments: --noodles=3")
    assert "unrecognized arguments: 3" in run("doctor", "3").stderr


def test_a_plan_asks_for_an_earlier_warning_where_a_job_takes_long_to_end(tmp_path):
    model, calibration = tmp_path / "model", tmp_path / "calibration.json"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    constants = json.loads((ROOT / "megatron_spice" / "cost" / "devices" / "cpu.json").read_text())
    said = run("plan", QUICKSTART, f"policy.model={model}", "--nodes=2").stdout
    assert "sbatch --nodes=2 slurm/spice.sh" in said and "#SBATCH --signal=B:USR1@180\n" in said
    playing, longest = _seconds_until_saved(said)
    assert 2 < playing <= longest < 180
    constants["constants"]["hand_over"]["value"] = 200.0  # of a sync, which is finished, and of the way back to the policy
    calibration.write_text(json.dumps(constants))
    said = run("plan", QUICKSTART, f"policy.model={model}", "--nodes=2", f"--calibration={calibration}").stdout
    assert "sbatch --nodes=2 --signal=B:USR1@420 slurm/spice.sh" in said and "#SBATCH --signal=B:USR1@420\n" in said
    assert _seconds_until_saved(said)[0] == playing and 400 < _seconds_until_saved(said)[1] <= 420


def _seconds_until_saved(said: str) -> tuple[int, int]:
    """Those that `plan` wants of Slurm when it ends a job: while it plays, and at most."""
    told = re.search(r"saved after about (\d+) s while it plays, (\d+) s at most:\n.*KillWait .*GraceTime", said)
    return int(told[1]), int(told[2])


def test_an_impossible_plan_is_printed_and_refused():
    done = run("plan", QUICKSTART, "policy.pipeline_parallel_size=4")
    assert done.returncode == 2
    assert "policy.pipeline_parallel_size=4" in done.stderr
    assert "pipeline_parallel_size: 4" in done.stdout


def test_a_plan_shows_every_rank_once(tmp_path):
    settings = ["cluster.ranks_per_node=4", "policy.context_parallel_size=2", "policy.virtual_pipeline_size=2"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    done = run("plan", QUICKSTART, *settings, f"policy.model={model}", "--nodes", "2")
    table = done.stdout.partition("rank  node")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [tuple(map(int, line.split()[:8])) for line in table]
    assert [row[0] for row in rows] == list(range(8))
    assert [row[1] for row in rows] == [0] * 4 + [1] * 4
    assert len({row[3:] for row in rows}) == 8
    assert [line.split()[8] for line in table] == ["0_0", "-", "-", "-", "1_0", "-", "-", "-"], "the first of each node hosts its engine"
    assert {line.split(maxsplit=9)[9] for line in table} == {"0-0 3-3", "1-2 4-4"}
    assert "tensor 1 x context 2 x data 2 x pipeline 2" in done.stdout


def test_a_plan_of_many_ranks_shows_every_node_once(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 4}))
    settings = ["cluster.ranks_per_node=4", "policy.tensor_parallel_size=2", "rollout.engines_per_node=2"]
    said = run("plan", QUICKSTART, *settings, f"policy.model={model}", "--nodes", "20", "train.passages=40").stdout
    names, *rows = said.partition("# Ranks")[2].partition("\n\n")[0].splitlines()[1:]
    assert names.split() == ["rank", "node", "local", "tensor", "context", "data", "expert", "pipeline", "engine", "layers"]
    assert [re.split(r"\s{2,}", row.strip()) for row in (rows[0], rows[10])] == [
        ["0-3", "0", "0-3", "0-1", "0", "0-1", "0", "0", "0_0 (rank 0), 0_1 (rank 2)", "0-1"],
        ["40-43", "10", "0-3", "0-1", "0", "0-1", "0", "1", "10_0 (rank 40), 10_1 (rank 42)", "2-3"],
    ]
    assert [row.split()[0] for row in rows] == [f"{4 * node}-{4 * node + 3}" for node in range(20)]


def test_a_plan_says_what_is_asked_of_slurm_also_for_one_node_of_cpus(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    said = run("plan", QUICKSTART, f"policy.model={model}", SBATCH_PARTITION="h 100", SBATCH_TIMELIMIT="24:00:00").stdout
    assert "sbatch --nodes=1 slurm/spice.sh" in said and "#SBATCH --mem=0\n" in said and "\nbash slurm/spice.sh" in said
    assert "SBATCH_PARTITION='h 100' SBATCH_TIMELIMIT=24:00:00 " in said
    iteration = float(re.search(r"# Expected time of an iteration on .*: ([\d.]+) s,", said)[1])
    assert int(re.search(r"shortest sensible --time: (\d+) min", said)[1]) == math.ceil((300 + iteration + 180) / 60)


def test_a_plan_says_what_memory_it_takes_and_refuses_what_cannot_fit(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    done = run("plan", QUICKSTART, f"policy.model={model}")
    table = done.stdout.partition("# Memory in GiB")[2].partition("\n\n")[0]
    assert all(name in table for name in ("weights", "gradients", "optimiser state", "activations (estimate)", "together"))
    assert "training   syncing   rollout" in table
    assert "# Checkpoints: " in done.stdout and "checkpoint.keep=2" in done.stdout

    large = {**MODEL, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    (model / "config.json").write_text(json.dumps(large))
    settings = [f"policy.model={model}", "cluster.device=cuda"]
    done = run("plan", QUICKSTART, *settings)
    assert done.returncode == 2
    assert "training takes" in done.stderr and "policy.tensor_parallel_size" in done.stderr
    assert "rollout.memory_fraction=0.6 of the" in done.stderr and "its weights alone take" in done.stderr


@pytest.mark.parametrize("command", ["plan", "launch-env"])
@pytest.mark.parametrize("is_seen", [True, False])
def test_a_run_whose_checkpoints_fit_on_no_disk_is_refused_before_it_queues(tmp_path, command, is_seen):
    """Where nothing of run.dir is on this machine, nothing is known of its disk and nothing is said against it."""
    model, corpus = tmp_path / "model", add_corpus(tmp_path / "corpus", "qwen3-4b")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 10**12, "max_position_embeddings": 16384}))
    run_dir = tmp_path / "run" if is_seen else Path("/not-mounted-here/run")
    settings = [f"policy.model={model}", f"corpus.path={corpus}", "rollout.context_length=16384", f"run.dir={run_dir}"]
    done = run(command, QUICKSTART, *settings)
    assert "Traceback" not in done.stderr
    refused = f"run.dir={run_dir}: its file system has" in done.stderr and "and a checkpoint takes" in done.stderr
    assert refused == is_seen, done.stderr
    if is_seen:
        assert done.returncode == 2 and "make room, or name a run.dir where there is" in done.stderr
    if command == "launch-env":
        assert (done.returncode, "SPICE_RUN_DIR" in done.stdout) == ((2, False) if is_seen else (0, True)), done.stderr
    elif not is_seen:
        assert "what is free cannot be seen from here" in done.stdout


def test_config_prints_a_recipe_that_loads_again(tmp_path):
    done = run("config", QUICKSTART, "train.iterations=3")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["train"]["iterations"] == 3
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert run("config", str(tmp_path / "again.yaml")).stdout == done.stdout


def test_training_without_torchrun_says_how_to_start_it():
    done = run("train", QUICKSTART)
    assert done.returncode == 2
    assert "slurm/spice.sh" in done.stderr


def test_torchrun_with_another_number_of_ranks_is_refused():
    done = run("train", QUICKSTART, WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", RANK="0")
    assert done.returncode == 2
    assert "cluster.ranks_per_node=2" in done.stderr and "--nproc-per-node=2" in done.stderr


def test_of_many_ranks_one_complains():
    done = run("train", QUICKSTART, WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_a_reader_that_stops_reading_is_no_error():
    command = f"'{sys.executable}' -m megatron_spice config | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

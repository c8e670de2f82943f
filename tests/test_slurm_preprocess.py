"""slurm/preprocess.sh: tasks here and in a real Slurm's array give the corpus of one run, whatever came between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import ENDED, Cluster, why_not
from tiny_tokenizer import write_tokenizer

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.verify import verify_corpus

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "preprocess.sh"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for several tasks: inputs of more than half the smallest unit are units of their own."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        lines = [json.dumps({"text": f"{number} and {line}. " * 40, "source": f"s{line % 3}"}) for line in range(12_000)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def one_run(texts: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, bytes]]:
    """The passages of the plain tool."""
    output = tmp_path_factory.mktemp("one") / "corpus"
    done = run(texts, model, output)
    assert done.returncode == 0 and "MB/s" in done.stdout, done.stderr
    assert not output.with_name("corpus.tasks").exists()
    return passages(output, model)


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SPICE_"))}
    return {**clean, "SPICE_VENV": sys.prefix, **more}


def arguments(texts: Path, model: Path, output: Path) -> list[str]:
    return [str(SCRIPT), str(texts), "--tokenizer", str(model), f"--output={output}", "--max-tokens", "300"]


def run(texts: Path, model: Path, output: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", *arguments(texts, model, output)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=200, check=False)


def passages(folder: Path, model: Path) -> list[tuple[int, str, bytes]]:
    corpus = Corpus(folder, TextTokenizer.from_dir(model))
    names = [source["name"] for source in corpus.manifest.sources]
    return [(index, names[corpus.source_id(index)], corpus.token_ids(index).tobytes()) for index in range(len(corpus))]


def test_tasks_here_give_the_corpus_of_one_run(texts: Path, model: Path, one_run: list, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    done = run(texts, model, output, SPICE_TASKS="3")
    assert done.returncode == 0, done.stderr
    assert passages(output, model) == one_run
    assert list(verify_corpus(output)) == []
    assert sorted(path.name for path in (tmp_path / "corpus.tasks").iterdir() if path.is_dir()) == ["00000", "00001", "00002"]
    again = run(texts, model, output, SPICE_TASKS="3")
    assert again.returncode == 0 and again.stdout.count("already there") == 3


@pytest.mark.skipif(why_not() is None, reason="a real Slurm does this here")
def test_the_last_task_of_an_array_joins_them(texts: Path, model: Path, one_run: list, tmp_path: Path) -> None:
    """Each task as Slurm starts it, in any order; one is run twice."""
    output = tmp_path / "corpus"
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
    for place, number in enumerate((2, 0, 0)):
        done = run(texts, model, output, SLURM_ARRAY_TASK_ID=str(number), **array)
        assert done.returncode == 0, done.stderr
        assert f"{min(place + 1, 2)} of 3 tasks are done" in done.stdout and not output.exists()
    rest = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "1", "SPICE_TASKS": "3"}
    assert run(texts, model, output, SLURM_ARRAY_TASK_ID="1", **rest).returncode == 0
    assert passages(output, model) == one_run


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ({"SPICE_TASKS": "none"}, 1, "SPICE_TASKS=none is not a number of tasks"),
        ({"SPICE_VENV": "/nowhere"}, 1, "install.sh"),
        ({"SPICE_SITE": "/nowhere"}, 1, "SPICE_SITE=/nowhere is not a file"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4", "SLURM_ARRAY_TASK_COUNT": "4"}, 1,
         "numbered 1 to 4: begin with 0"),
        ({"SPICE_TASKS": "2"}, 2, "no such file"),
    ],
)  # fmt: skip
def test_a_wrong_start_is_told_and_makes_nothing(
    model: Path, tmp_path: Path, more: dict[str, str], code: int, message: str
) -> None:
    done = run(tmp_path / "nowhere", model, tmp_path / "corpus", **more)
    assert done.returncode == code and message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_output_must_be_told_and_tasks_must_not() -> None:
    for rest, code, message in (([], 2, "usage:"), (["--output", "x", "--task", "0/2"], 1, "leave out --task")):
        done = subprocess.run(["bash", str(SCRIPT), *rest], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == code and message in done.stderr


def test_a_container_runs_the_tool(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("apptainer", "srun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    image = tmp_path / "image.sif"
    image.touch()
    tool = f"{sys.prefix}/bin/python {ROOT}/tools/preprocess_corpus.py {tmp_path} --tokenizer {model}"
    done = run(tmp_path, model, tmp_path / "corpus", PATH=path, SPICE_CONTAINER=str(image))
    assert done.stdout.startswith(f"apptainer exec --nv --bind {ROOT}:{ROOT}") and f" {image} {tool}" in done.stdout
    in_job = {"SPICE_CONTAINER": "registry/image:1", "SPICE_MOUNTS": "/data", "SLURM_JOB_ID": "1"}  # Pyxis is srun's
    done = run(tmp_path, model, tmp_path / "corpus", PATH=path, **in_job)
    step = f"srun --nodes=1 --ntasks=1 --export=ALL --container-image=registry/image:1 --container-mounts={ROOT}:{ROOT}"
    assert done.stdout.startswith(step) and f",/data --container-workdir={os.getcwd()} {tool}" in done.stdout


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_an_array_on_a_real_slurm(slurm: Cluster, texts: Path, model: Path, one_run: list, tmp_path: Path) -> None:
    """One of its three tasks has been done before, by an array of that task alone."""

    def run_array(numbers: range, **more: str) -> list[str]:
        exports = ",".join(["ALL", *(f"{name}={value}" for name, value in {"SPICE_VENV": sys.prefix, **more}.items())])
        options = (f"--array={numbers.start}-{numbers.stop - 1}", f"--export={exports}", f"--output={tmp_path}/%A-%a.log")
        job = slurm.client("sbatch", "--parsable", *options, *arguments(texts, model, tmp_path / "corpus"), cwd=ROOT).strip()
        states = {task: slurm.wait(f"{job}_{task}", *ENDED)["JobState"] for task in numbers}
        logs = [(tmp_path / f"{job}-{task}.log").read_text() for task in numbers]
        assert set(states.values()) == {"COMPLETED"}, (states, logs)
        return logs

    [before] = run_array(range(1, 2), SPICE_TASKS="3")
    assert "1 of 3 tasks are done" in before and not (tmp_path / "corpus").exists()
    logs = run_array(range(3))
    assert "already there" in logs[1], logs
    assert passages(tmp_path / "corpus", model) == one_run, logs

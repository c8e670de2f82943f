from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_spice import doctor, machine

ROOT = Path(__file__).resolve().parent.parent


def report(path: Path | None = None, python_path: Path | None = None, *options: str) -> dict[str, dict[str, dict[str, str]]]:
    """The doctor's JSON by section and row name; `path` goes in front of PATH, `python_path` in front of PYTHONPATH."""
    environment = dict(os.environ)
    if path:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    if python_path:
        environment["PYTHONPATH"] = str(python_path)
    command = [sys.executable, "-m", "megatron_spice", "doctor", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=True)
    return {section: {row["name"]: row for row in rows} for section, rows in json.loads(done.stdout).items()}


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_it_finds_what_is_installed_here():
    packages = report()["packages"]
    assert packages["megatron-core"]["state"] == "ok"
    assert packages["megatron-core"]["value"] == machine.version("megatron-core")
    assert packages["sglang"]["value"] == machine.version("sglang")


def test_the_table_holds_the_same_rows():
    command = [sys.executable, "-m", "megatron_spice", "doctor"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=True).stdout
    for section, rows in report().items():
        assert f"{section}\n" in text
        for name in rows:
            assert f"  {name} " in text


def test_remedies_install_into_the_environment_and_within_the_constraints():
    """As whole commands: a bare pip is another Python's."""
    remedies = [package.remedy for package in doctor.PACKAGES if package.remedy != doctor.INSTALL]
    assert len(remedies) > 3
    for remedy in remedies:
        words = remedy.split()
        assert words[:6] == [".venv/bin/python", "-m", "pip", "install", "-c", "requirements/constraints.txt"] and len(words) > 6
        for file in (word for word in words if word.endswith(".txt")):
            assert (ROOT / file).is_file()


def test_every_example_is_judged():
    recipes = report()["recipes"]
    assert set(recipes) == {path.name for path in (ROOT / "examples").glob("*.yaml")}
    paper = recipes["qwen3-4b-1n8g-tp2pp1-bf16.yaml"]
    assert paper["value"] == "cuda, bf16, 8 ranks a node"


def test_a_recipe_is_judged_on_as_many_nodes_as_its_name_says():
    recipes = report()["recipes"]
    large = recipes["qwen3-32b-4n8g-tp4pp4-bf16.yaml"]
    assert large["value"] == "cuda, bf16, 8 ranks a node, 4 nodes"
    assert not [name for name, row in recipes.items() if "does not divide" in row["remedy"]]
    assert "MATHEMATICS.jsonl GENERAL.jsonl --source mathematics --source general" in large["remedy"]
    remedy = report(None, None, "--nodes=1")["recipes"]["qwen3-32b-4n8g-tp4pp4-bf16.yaml"]["remedy"]
    assert "16 does not divide the 8 ranks" in remedy


@pytest.mark.skipif(bool(machine.accelerators()), reason="this machine has GPUs")
def test_a_recipe_for_gpus_is_missing_them_here():
    remedy = report()["recipes"]["qwen3-4b-1n8g-tp2pp1-bf16.yaml"]["remedy"]
    assert "8 GPUs a node" in remedy and "policy.model" in remedy and "corpus.path" in remedy


def test_the_apex_of_pypi_is_told_from_nvidias(tmp_path):
    """PyPI's is a package for Pyramid; only NVIDIA's has apex.optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "apex-0.9.10.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    wrong = report(python_path=tmp_path)["packages"]["Apex"]
    assert wrong["state"] == "wrong" and "another project" in wrong["value"] and "pip uninstall apex" in wrong["remedy"]

    (tmp_path / "apex" / "optimizers").mkdir()
    unbuilt = report(python_path=tmp_path)["packages"]["Apex"]
    assert unbuilt["state"] == "wrong" and "without its CUDA extensions" in unbuilt["value"]
    (tmp_path / "amp_C.py").touch()
    assert report(python_path=tmp_path)["packages"]["Apex"]["state"] == "ok"


def test_an_absent_package_that_is_needed_is_missing_with_its_remedy():
    package = doctor.Package("nothing", ("no-such-distribution",), "cuda", "a test")
    assert doctor._package(package, has_gpu=True).state == "missing"
    assert doctor._package(package, has_gpu=True).remedy == doctor.INSTALL
    assert doctor._package(package, has_gpu=False).state == "absent"


def test_gpus_and_slurm_are_read_from_their_tools(tmp_path):
    executable(tmp_path / "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559, 580.10'; echo 'NVIDIA H100 80GB HBM3, 81559, 580.10'")
    executable(tmp_path / "sinfo", "echo 'slurm 24.05.1'")
    rows = report(path=tmp_path)["machine"]
    assert rows["accelerator"]["value"] == "NVIDIA H100 80GB HBM3, 80 GiB, driver 580.10"
    assert rows["Slurm"]["value"] == "slurm 24.05.1"
    assert rows["torch on CUDA"]["state"] in ("wrong", "missing")


def gpu_machine(
    path: Path, capability: str = "9.0", engine: str | None = "2.9.0", cuda: str | None = "13.0", engine_code: str = ""
) -> dict[str, dict[str, dict[str, str]]]:
    """The doctor's report on a made-up machine with a GPU: its tools and its installed packages stand in `path`. Its torch can be
    imported by a child process alone, its Transformer Engine does `engine_code` when it is."""
    bin, site = path / "bin", path / "site"
    for folder in (bin, site / "torch"):
        folder.mkdir(parents=True, exist_ok=True)
    answers = f"*compute_cap*) echo {capability};; *) echo 'NVIDIA H100, 81559, 580.10';;"
    executable(bin / "nvidia-smi", f'case "$*" in {answers} esac')
    (site / "torch" / "__init__.py").write_text("import sys\nif sys.argv[0] != '-c': raise RuntimeError('must not be imported')")
    lines = ["__version__ = '2.13.0'", f"cuda: Optional[str] = {cuda!r}", "cuda_x = '1.0'", ""]
    (site / "torch" / "version.py").write_text("\n".join(lines))
    if engine:
        metadata = site / f"transformer_engine-{engine}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {engine}\n")
        (site / "transformer_engine" / "pytorch").mkdir(parents=True)
        (site / "transformer_engine" / "__init__.py").touch()
        (site / "transformer_engine" / "pytorch" / "__init__.py").write_text(f"import torch, os, sys\n{engine_code}\n")
    return report(path=bin, python_path=site)


def test_fp8_on_a_hopper_is_real(tmp_path):
    rows = gpu_machine(tmp_path)["training"]
    for recipe in ("blockwise", "tensorwise", "delayed"):
        assert rows[f"FP8 {recipe}"]["state"] == "ok"
        assert rows[f"FP8 {recipe}"]["value"] == "Transformer Engine 2.9.0, GPUs of compute capability 9.0, CUDA 13.0"
    assert rows["fused optimiser"]["value"] == "Transformer Engine FusedAdam"
    assert rows["weight-gradient fusion"]["value"] == "Transformer Engine, in its layers"


def test_what_is_missing_for_an_fp8_recipe_is_said_with_its_remedy(tmp_path):
    rows = gpu_machine(tmp_path, capability="8.9", engine="2.2.0", cuda="12.8")
    blockwise, tensorwise = rows["training"]["FP8 blockwise"], rows["training"]["FP8 tensorwise"]
    assert blockwise["state"] == "missing" and tensorwise["state"] == "ok"
    for said in ("2.3 or newer, found 2.2.0", "9.0 or newer, found 8.9", "12.9 or newer, found 12.8", "recipe=tensorwise"):
        assert said in blockwise["remedy"]
    assert "9.0 or newer, found 8.9" in rows["recipes"]["qwen3-8b-1n8g-tp2pp1-fp8.yaml"]["remedy"]
    assert "compute capability" not in rows["recipes"]["qwen3-4b-1n8g-tp2pp1-bf16.yaml"]["remedy"]


def test_without_transformer_engine_a_gpu_has_no_fp8_and_nothing_fused(tmp_path):
    rows = gpu_machine(tmp_path, engine=None, cuda=None)["training"]
    assert "not installed" in rows["FP8 delayed"]["remedy"] and "found none" in rows["FP8 delayed"]["remedy"]
    assert rows["fused optimiser"]["state"] == rows["weight-gradient fusion"]["state"] == "missing"


UNDEFINED = "transformer_engine.so: undefined symbol: cublasLtGroupedMatrixLayoutInit_internal, version libcublasLt.so.13"


@pytest.mark.parametrize(("code", "words"), [
    (f"raise OSError('{UNDEFINED}')", f"OSError: {UNDEFINED}"),
    ("print('no such driver', file=sys.stderr, flush=True); os.abort()", "ended by signal SIGABRT, no such driver"),
])  # fmt: skip
def test_a_transformer_engine_that_cannot_be_imported_is_wrong_and_says_why(tmp_path, code, words):
    found = gpu_machine(tmp_path, engine_code=code)
    engine = found["packages"]["transformer-engine"]
    assert engine["state"] == "wrong" and engine["value"] == f"2.9.0, cannot be imported: {words}" and "LD_LIBRARY_PATH" in engine["remedy"]
    rows = found["training"]
    for recipe in ("blockwise", "tensorwise", "delayed"):
        assert rows[f"FP8 {recipe}"]["state"] == "missing" and words in rows[f"FP8 {recipe}"]["remedy"]
    assert rows["fused optimiser"]["state"] == rows["weight-gradient fusion"]["state"] == "missing"
    for recipe in ("qwen3-8b-1n8g-tp2pp1-fp8.yaml", "qwen3-4b-1n8g-tp2pp1-bf16.yaml"):
        assert words in found["recipes"][recipe]["remedy"]


def test_an_import_that_does_not_end_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    assert machine.import_failure("endless", timeout=1.0) == "not imported within 1 s"
    assert time.monotonic() - began < 20
    assert machine.import_failure("json", "os") is None
    assert machine.import_failure("json", "no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


@pytest.mark.skipif(bool(machine.accelerators()), reason="this machine has GPUs")
def test_a_broken_transformer_engine_is_nobodys_business_without_a_gpu(tmp_path):
    gpu_machine(tmp_path, engine_code="raise OSError('broken')")
    assert report(python_path=tmp_path / "site")["packages"]["transformer-engine"]["state"] == "ok"


def test_nvidias_apex_comes_first_for_the_optimiser(tmp_path):
    (tmp_path / "site" / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").touch()
    (tmp_path / "site" / "amp_C.py").touch()
    (tmp_path / "site" / "fused_weight_gradient_mlp_cuda.py").touch()
    both = gpu_machine(tmp_path)["training"]
    assert both["fused optimiser"]["value"] == "Apex FusedAdam"
    assert both["weight-gradient fusion"]["value"] == "Transformer Engine, in its layers"
    shutil.rmtree(tmp_path / "site" / "transformer_engine-2.9.0.dist-info")
    alone = report(path=tmp_path / "bin", python_path=tmp_path / "site")["training"]
    assert alone["weight-gradient fusion"]["value"] == "Apex, in Megatron's layers"


@pytest.mark.skipif(bool(machine.accelerators()), reason="this machine has GPUs")
def test_without_a_gpu_fp8_is_emulated():
    rows = report()["training"]
    assert rows["FP8 blockwise"]["value"].startswith("emulated") and rows["FP8 delayed"]["state"] == "absent"
    assert rows["fused optimiser"]["value"].startswith("torch") and rows["weight-gradient fusion"]["value"].startswith("torch")


def test_the_torch_that_is_installed_is_read_without_importing_it():
    import torch

    assert machine.torch_cuda() == torch.version.cuda


def test_a_broken_driver_is_no_gpu(tmp_path):
    executable(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed' ; exit 9")
    row = report(path=tmp_path)["machine"]["accelerators"]
    assert row["state"] == "absent" and "lists none" in row["value"]


def test_a_small_shared_memory_is_wrong():
    assert doctor._shared_memory(0.0625).state == "wrong"
    assert "--shm-size" in doctor._shared_memory(0.0625).remedy
    assert doctor._shared_memory(16.0).state == "ok"

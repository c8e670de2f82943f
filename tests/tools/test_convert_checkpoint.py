"""The command line: there and back for a model of transformers' own, with the same logits, and bad input refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_folders import assert_same_model, read_tensors, write_model
from small_models import add_tokenizer, import_transformers, make_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def tool(capsys):
    """Runs the tool in this process: its exit code, what it printed, and what it complained of."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def _logits(folder: Path) -> torch.Tensor:
    import_transformers()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("family, tied, route", [("llama", True, "torch_dist"), ("qwen3_moe", False, "mp_rank")])
def test_there_and_back_transformers_computes_the_same_logits(tmp_path, tool, family, tied, route):
    model = add_tokenizer(make_model(tmp_path / "hf", family, tied, rope_scaling=True))
    layout = ["--tensor-parallel-size", 2, "--expert-parallel-size", 2] if route == "mp_rank" else []
    code, _, complaint = tool("hf-to-megatron", model, tmp_path / "megatron", "--format", route, *layout, "--processes", 2)
    assert code == 0, complaint
    hf = ["--hf", model] if route == "mp_rank" else []
    code, _, complaint = tool("megatron-to-hf", tmp_path / "megatron", tmp_path / "again", *hf, "--shard-size", "100KB")
    assert code == 0, complaint
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2
    assert_same_model(model, tmp_path / "again")
    assert {path.name for path in model.iterdir()} - {"model.safetensors"} <= {path.name for path in (tmp_path / "again").iterdir()}
    assert torch.equal(_logits(model), _logits(tmp_path / "again"))
    code, said, _ = tool("compare", tmp_path / "again", tmp_path / "megatron", *hf)
    assert code == 0 and "the same bits" in said
    code, said, _ = tool("inspect", tmp_path / "megatron", *hf, "--tensors")
    assert code == 0 and family in said and "model.norm.weight  [64]  float32" in said


def test_differences_are_told_and_end_with_exit_code_1(tmp_path, tool):
    one, other = write_model(tmp_path / "one", "qwen3"), write_model(tmp_path / "other", "qwen3", seed=1)
    code, said, _ = tool("compare", one, other)
    assert code == 1
    assert len(read_tensors(one)) == sum("|difference|" in line for line in said.splitlines())


def test_it_starts_without_megatron_and_without_the_libraries_of_gpus(tmp_path):
    """Whatever of them a machine has may fail as it is imported; here it does."""
    for name in ("megatron", "transformer_engine", "flash_attn", "triton", "apex", "sglang", "transformers"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    model = write_model(tmp_path / "hf", "llama")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    for arguments in (["hf-to-megatron", model, tmp_path / "out"], ["megatron-to-hf", tmp_path / "out", tmp_path / "back"]):
        command = [sys.executable, str(TOOL), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    assert_same_model(model, tmp_path / "back")


def test_bad_input_is_refused(tmp_path, tool):
    model = write_model(tmp_path / "hf", "llama")
    (tmp_path / "there").mkdir()
    alien = write_model(tmp_path / "alien", "llama")
    (alien / "config.json").write_text(json.dumps({**json.loads((alien / "config.json").read_text()), "model_type": "mamba"}))
    for arguments, words in [
        (["hf-to-megatron", model, tmp_path / "there"], ["exists"]),
        (["hf-to-megatron", tmp_path / "nowhere", tmp_path / "out"], ["nowhere", "not there"]),
        (["hf-to-megatron", alien, tmp_path / "out"], ["mamba", "llama, qwen2, qwen3, qwen3_moe"]),
        (["hf-to-megatron", model, tmp_path / "out", "--tensor-parallel-size", 2], ["mp_rank"]),
        (["hf-to-megatron", model, tmp_path / "out", "--format", "mp_rank", "--tensor-parallel-size", 3], ["num_attention_heads=8"]),
        (["hf-to-megatron", model, tmp_path / "out", "--format", "mp_rank", "--num-layers-per-virtual-pipeline-stage", 3], ["=4", "=3"]),
        (["megatron-to-hf", tmp_path / "there", tmp_path / "out"], ["no checkpoint", "config.json"]),
        (["megatron-to-hf", model, tmp_path / "out", "--shard-size", "big"], ["big is not a size"]),
        (["inspect", tmp_path / "there"], ["no checkpoint"]),
    ]:  # fmt: skip
        code, _, complaint = tool(*arguments)
        assert code == 2 and all(word in complaint for word in words), complaint
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

"""Hugging Face -> Megatron -> Hugging Face gives every byte back, and bad input is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import make_model
from torch.distributed.checkpoint import FileSystemReader

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def _convert(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


FUSED_NORM = "mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize("family, tied, dtype, norm", [
    ("llama", True, torch.bfloat16, FUSED_NORM), ("qwen2", False, torch.bfloat16, FUSED_NORM),
    ("qwen3", False, torch.float32, FUSED_NORM), ("qwen3_moe", False, torch.bfloat16, "pre_mlp_layernorm.weight"),
])  # fmt: skip
def test_round_trip_is_bit_identical(tmp_path, family, tied, dtype, norm):
    model = make_model(tmp_path / "hf", family, tied, dtype)
    there = _convert("hf-to-megatron", model, tmp_path / "megatron")
    assert there.returncode == 0, there.stderr
    assert norm in _layer_names(tmp_path / "megatron"), "Transformer Engine's layers would not find their norm"
    back = _convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "again")
    assert back.returncode == 0, back.stderr
    source, result = load_file(model / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert source.keys() == result.keys()
    assert all(torch.equal(source[name], result[name]) and source[name].dtype == result[name].dtype for name in source)
    assert (tmp_path / "again" / "config.json").read_text() == (model / "config.json").read_text()


def _layer_names(checkpoint: Path) -> set[str]:
    keys = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    return {key.removeprefix("decoder.layers.") for key in keys}


def test_bad_input_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    refused = _convert("hf-to-megatron", tmp_path / "nowhere", tmp_path / "there")
    assert refused.returncode == 2 and "exists" in refused.stderr
    refused = _convert("hf-to-megatron", tmp_path / "nowhere", tmp_path / "out")
    assert refused.returncode == 2 and "nowhere" in refused.stderr
    assert not (tmp_path / "out").exists()

"""Hugging Face folders with random weights, made from the name table in milliseconds, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_spice.config.hf import read_architecture
from megatron_spice.weights.names import hf_shapes, table

SIZES: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True,
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "merges.txt", "generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja")


def write_model(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, shards: int = 1, seed: int = 0, **sizes: Any
) -> Path:
    """A folder of a family; `sizes` are keys of `config.json` that shall be otherwise. Weights are any bits: NaN too."""
    folder.mkdir(parents=True)
    config = {"model_type": family, **SIZES, **sizes, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of {family}")
    architecture = read_architecture(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8).view(dtype)
        for entry in table(architecture)
        for name, shape in hf_shapes(entry, architecture).items()
    }
    write_tensors(folder, tensors, shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Tensors as a folder's weights, dealt to so many shards."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_model(one: Path, other: Path) -> None:
    """The same names, shapes, precisions and bits, and the same small files."""
    ours, theirs = read_tensors(one), read_tensors(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    for name in ("config.json", *TOKENIZER):
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            assert json_or_text(one / name) == json_or_text(other / name)


def json_or_text(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.name == "config.json" else text

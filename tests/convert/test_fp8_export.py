"""Block-FP8 folders: what is in them is what the shared quantiser makes, told in the words engines read, and it reads back."""

from __future__ import annotations

import json

import pytest
import torch
from conversions import to_hf, to_torch_dist
from hf_folders import read_tensors, write_model, write_tensors
from small_models import import_transformers

from megatron_spice.config.hf import read_architecture
from megatron_spice.convert.find import open_source
from megatron_spice.weights.fp8 import dequantise, quantise
from megatron_spice.weights.plan import quantised_names


def _model(folder, family="qwen3", dtype=torch.bfloat16, **sizes):
    """Ordinary numbers, and matrices of more than a block."""
    sizes = {"hidden_size": 144, "intermediate_size": 200, "head_dim": 24, "num_hidden_layers": 2, "moe_intermediate_size": 136, **sizes}
    folder = write_model(folder, family, dtype, **sizes)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in read_tensors(folder).items()}
    write_tensors(folder, tensors, shards=2)
    return folder


@pytest.mark.parametrize("family, dtype", [("qwen2", torch.bfloat16), ("qwen3_moe", torch.bfloat16), ("llama", torch.float32)])
def test_linears_become_numbers_and_factors_and_nothing_else_changes(tmp_path, family, dtype):
    model = _model(tmp_path / "hf", family, dtype)
    source = {name: tensor.bfloat16() for name, tensor in read_tensors(model).items()}
    exported = to_hf(to_torch_dist(model, tmp_path / "megatron"), tmp_path / "fp8", fp8=True, shard_bytes=100_000)
    found = read_tensors(exported)
    linears = quantised_names(read_architecture(model), range(2))
    assert found.keys() == source.keys() | {f"{name}_scale_inv" for name in linears} and len(linears) >= 14
    for name, tensor in source.items():
        if name not in linears:
            assert torch.equal(found[name], tensor)
            continue
        values, factors = quantise(tensor)
        assert found[name].dtype == torch.float8_e4m3fn and torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))
        assert found[f"{name}_scale_inv"].dtype == torch.float32 and torch.equal(found[f"{name}_scale_inv"], factors)
        assert factors.shape == tuple(-(-size // 128) for size in tensor.shape)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert {name: tensor for name, tensor in index["weight_map"].items()}.keys() == found.keys()


def test_the_configuration_says_so_in_the_words_of_engines(tmp_path):
    model = _model(tmp_path / "hf", "qwen3_moe")
    told = json.loads((to_hf(model, tmp_path / "fp8", fp8=True) / "config.json").read_text())
    assert told["dtype"] == "bfloat16" and told["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    }  # fmt: skip


def test_a_quantised_folder_is_a_source_in_bfloat16(tmp_path):
    model = _model(tmp_path / "hf")
    fp8 = to_hf(model, tmp_path / "fp8", fp8=True)
    back = read_tensors(to_hf(to_torch_dist(fp8, tmp_path / "megatron"), tmp_path / "back"))
    source = read_tensors(model)
    linears = quantised_names(read_architecture(model), range(2))
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        wanted = dequantise(*quantise(tensor), dtype=torch.bfloat16) if name in linears else tensor
        assert torch.equal(back[name], wanted)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("change, words", [
    (lambda config, tensors: config["quantization_config"].update(quant_method="gptq"), ["gptq", "bf16 model"]),
    (lambda config, tensors: config["quantization_config"].update(weight_block_size=[64, 64]), ["[64, 64]"]),
    (lambda config, tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), ["up_proj", "no _scale_inv"]),
    (lambda config, tensors: config.pop("quantization_config"), ["_scale_inv", "unexpected"]),
])  # fmt: skip
def test_other_quantisations_and_lost_factors_are_refused(tmp_path, change, words):
    fp8 = to_hf(_model(tmp_path / "hf"), tmp_path / "fp8", fp8=True)
    config, tensors = json.loads((fp8 / "config.json").read_text()), read_tensors(fp8)
    change(config, tensors)
    (fp8 / "config.json").write_text(json.dumps(config))
    write_tensors(fp8, tensors)
    with pytest.raises(ValueError) as error:
        open_source(fp8)
    assert all(word in str(error.value) for word in words), error.value


def test_transformers_loads_it(tmp_path):
    """Dequantised, as it does without a GPU: the same logits as of the numbers times their factors."""
    import_transformers()
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    fp8 = to_hf(_model(tmp_path / "hf", hidden_size=256, intermediate_size=384, head_dim=64), tmp_path / "fp8", fp8=True)
    rounded = to_hf(fp8, tmp_path / "rounded")
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.bfloat16)(ids).logits
    ways = FineGrainedFP8Config(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16, quantization_config=ways)(ids).logits
    assert torch.equal(found, expected)

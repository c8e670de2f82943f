"""Engines with block-quantised weights: a real server holds what was sent, and computes what the policy's rounding says.

On a CPU the product is a stand-in of ours (`rollout/cpu_fp8.py`), so what it shows is that numbers and factors arrive in their
places; how SGLang's CUDA kernels multiply them is not tested here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conversions import to_hf
from ranks import run_ranks
from small_models import add_tokenizer, make_model

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.supervisor import SglangEngine
from megatron_spice.weights.fp8 import dequantise

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "moe_intermediate_size": 128, "num_experts": 4, "initializer_range": 0.05,
}  # fmt: skip
CASES = {
    "tensor 2, outer layers in bf16": (
        "qwen3", {"tensor_parallel_size": 2, "fp8": {"first_layers_bf16": 1, "last_layers_bf16": 1}}
    ),
    "experts over 2 ranks": ("qwen3_moe", {"expert_parallel_size": 2}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def results(request, tmp_path_factory):
    family, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("fp8")
    sizes = {name: size for name, size in SIZES.items() if "expert" not in name and "moe" not in name or family == "qwen3_moe"}
    model = add_tokenizer(make_model(folder / "hf", family, tied=False, dtype=torch.bfloat16, **sizes))
    script = Path(__file__).with_name("fp8_on_ranks.py")
    first, second = run_ranks(2, script, "send_to_both", str(model), settings, str(folder))
    return first, second, (folder / "fp8.log").read_text()


def _tensor(dtype, shape, octets):
    return torch.from_numpy(octets).view(dtype).view(shape)


def test_what_is_sent_is_what_the_policy_multiplies(results):
    first, second, _ = results
    sent, rounded = ({name: _tensor(*parts) for name, parts in first[kind].items()} for kind in ("sent", "rounded"))
    factors = {name for name in sent if name.endswith("_scale_inv")}
    assert factors and rounded.keys() == sent.keys() - factors
    for name, tensor in rounded.items():
        if f"{name}_scale_inv" in factors:
            assert sent[name].dtype == torch.float8_e4m3fn and sent[f"{name}_scale_inv"].dtype == torch.float32
            assert torch.equal(dequantise(sent[name], sent[f"{name}_scale_inv"], dtype=torch.bfloat16), tensor)
        else:
            assert torch.equal(sent[name], tensor)
            assert "proj" not in name or "layers.0." in name or "layers.3." in name
    assert first["bytes"] < 0.8 * sum(tensor.nbytes for tensor in rounded.values())
    assert second["sent"] == {} and second["bytes"] == 0, "a rank without an engine got something"


def test_the_engine_computes_what_one_with_rounded_weights_computes(results):
    first, _, log = results
    fp8, rounded = first["engines"]
    assert fp8 == rounded, "not the same to the bit"
    difference = (torch.tensor(fp8) - torch.tensor(first["policy"])).abs().mean().item()
    assert difference < 0.1, "the policy rounds activations as well, more is not between them"
    assert "not found in params_dict" not in log, "the engine left out what it was sent"


def test_a_sync_overwrites_every_parameter(results):
    """SGLang fills all its parameters with random numbers; after the next sync nothing is left of them."""
    first, _, _ = results
    assert first["reset"] and first["again"] == first["engines"][0]


def test_an_engine_loads_an_exported_folder(tmp_path):
    """tools/convert_checkpoint.py megatron-to-hf --dtype fp8: from the disk as well, numbers and factors come to their places."""
    sizes = {name: size for name, size in SIZES.items() if "expert" not in name and "moe" not in name}
    model = add_tokenizer(make_model(tmp_path / "hf", "qwen3", tied=False, dtype=torch.bfloat16, **sizes))
    exported = to_hf(model, tmp_path / "fp8", fp8=True)
    config = RolloutConfig(max_total_tokens=1024, max_running_requests=4, threads=1)
    told = json.loads((exported / "config.json").read_text())["quantization_config"]  # again: it brings the stand-in
    engines = [
        SglangEngine(config, Topology(), "bf16", folder, tmp_path / f"{folder.name}.log", load_format="auto", quantization=quantization)
        for folder, quantization in ((exported, told), (to_hf(exported, tmp_path / "rounded"), None))
    ]
    try:
        for engine in engines:
            engine.launch()
        for engine in engines:
            engine.wait_ready()
        fp8, rounded = (engine.score(list(range(5, 60))) for engine in engines)
    finally:
        for engine in engines:
            engine.close()
    assert fp8 == rounded and len(fp8) == 54

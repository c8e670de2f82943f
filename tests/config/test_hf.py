from __future__ import annotations

import json

import pytest

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import ModelArchitecture, hugging_face_folder, read_architecture

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_llama_with_rope_parameters(smollm2):
    shape = ModelArchitecture.from_config(smollm2)
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == ("llama", 30, 576, 1536)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (9, 3, 64)
    assert (shape.rope_theta, shape.rope_scaling, shape.norm_epsilon) == (100000.0, None, 1e-5)
    assert shape.tied_embeddings and not shape.qkv_bias and not shape.qk_norm


def test_qwen3_with_rope_theta_at_the_top():
    shape = ModelArchitecture.from_config(QWEN3)
    assert (shape.rope_theta, shape.rope_scaling) == (1000000.0, None)
    assert shape.qk_norm and not shape.qkv_bias
    assert shape.head_dim * shape.num_attention_heads != shape.hidden_size


def test_qwen2_has_biases_that_its_file_does_not_mention():
    shape = ModelArchitecture.from_config({**QWEN3, "model_type": "qwen2", "head_dim": None})
    assert shape.qkv_bias and not shape.qk_norm and shape.head_dim == 80


def test_qwen3_moe_has_experts():
    shape = ModelArchitecture.from_config(QWEN3_MOE)
    assert (shape.num_experts, shape.experts_per_token, shape.expert_ffn_hidden_size) == (128, 8, 768)
    assert shape.normalize_expert_weights and shape.qk_norm and not shape.qkv_bias
    unsaid = ModelArchitecture.from_config({k: v for k, v in QWEN3_MOE.items() if k not in ("norm_topk_prob", "head_dim")})
    assert not unsaid.normalize_expert_weights and unsaid.head_dim == 80
    renamed = {**QWEN3_MOE, "num_experts": None, "num_local_experts": 64}
    assert ModelArchitecture.from_config(renamed).num_experts == 64


def test_a_dense_model_has_no_experts(smollm2):
    assert ModelArchitecture.from_config(smollm2 | {"num_experts": 8}).num_experts is None


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"mlp_only_layers": [0, 3]}, ["mlp_only_layers=[0, 3]", "supported: []"]),
        ({"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "supported: 1"]),
        ({"num_experts_per_tok": 200}, ["num_experts_per_tok=200", "num_experts=128"]),
        ({"num_experts_per_tok": 1}, ["num_experts_per_tok=1", "norm_topk_prob=true"]),
        ({"num_experts": None}, ["num_experts is missing"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size is 0"]),
    ],
)
def test_mixtures_that_cannot_be_built_are_refused_by_name(change, parts):
    with pytest.raises(ConfigError) as caught:
        ModelArchitecture.from_config(QWEN3_MOE | change, "here/config.json")
    for part in ["here/config.json", *parts]:
        assert part in str(caught.value)


def test_missing_key_value_heads_mean_as_many_as_heads(smollm2):
    del smollm2["num_key_value_heads"]
    assert ModelArchitecture.from_config(smollm2).num_query_groups == 9


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_kept_under_either_name(smollm2, name):
    del smollm2["rope_parameters"]
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    smollm2 |= {"rope_theta": 500000.0, name: scaling}
    shape = ModelArchitecture.from_config(smollm2)
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling == scaling
    smollm2[name] = {**scaling, "rope_type": "yarn"}
    with pytest.raises(ConfigError, match="yarn.*not supported"):
        ModelArchitecture.from_config(smollm2)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "mamba"}, ["model_type='mamba'", "llama, qwen2, qwen3, qwen3_moe"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers is missing"]),
        ({"hidden_size": "wide"}, ["hidden_size is 'wide'"]),
        ({"vocab_size": 0}, ["vocab_size is 0"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "num_attention_heads=9"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(smollm2, change, parts):
    with pytest.raises(ConfigError) as caught:
        ModelArchitecture.from_config(smollm2 | change, "here/config.json")
    for part in ["here/config.json", *parts]:
        assert part in str(caught.value)


def test_a_converted_checkpoint_keeps_the_file_below_hf(tmp_path, smollm2):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(smollm2))
    assert hugging_face_folder(tmp_path) == tmp_path / "hf"
    assert read_architecture(tmp_path).num_layers == 30


@pytest.mark.parametrize("content", [None, "", "[1]", "{", b"\xff\xfe"])
def test_an_unreadable_model_is_one_clear_error(tmp_path, content):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_architecture(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_that_is_not_there_comes_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match="convert_checkpoint.py hf-to-megatron"):
        read_architecture(tmp_path / "nothing")

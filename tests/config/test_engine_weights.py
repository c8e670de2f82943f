"""FP8 engines are refused wherever they would not hold the policy's own weights."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_spice.config.engine_weights import engine_weights_problems, fp8_layers, quantization_config
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import Config

QWEN3_8B = ModelArchitecture(
    family="qwen3", num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8,
    head_dim=128, vocab_size=151936, norm_epsilon=1e-6, rope_theta=1e6, rope_scaling=None, max_position_embeddings=40960,
    tied_embeddings=False, qkv_bias=False, qk_norm=True,
)  # fmt: skip
QWEN3_4B = dataclasses.replace(QWEN3_8B, hidden_size=2560, ffn_hidden_size=9728)
QWEN3_30B = dataclasses.replace(
    QWEN3_8B, family="qwen3_moe", num_layers=48, hidden_size=2048, ffn_hidden_size=6144, num_query_groups=4, num_experts=128,
    experts_per_token=8, expert_ffn_hidden_size=768,
)  # fmt: skip


def config(policy: dict | None = None, **rollout: object) -> Config:
    return Config.model_validate({
        "run": {"dir": "run"}, "corpus": {"path": "corpus"}, "policy": {"model": "model", "precision": "fp8"} | (policy or {}),
        "rollout": {"weights": "fp8"} | rollout,
    })  # fmt: skip


@pytest.mark.parametrize("architecture", [QWEN3_8B, QWEN3_4B, QWEN3_30B])
@pytest.mark.parametrize("size", [1, 2])
def test_real_models_fit(architecture, size):
    assert engine_weights_problems(config({"tensor_parallel_size": size}, tensor_parallel_size=size), architecture) == []


@pytest.mark.parametrize(
    ("policy", "rollout", "changes", "parts"),
    [
        ({"precision": "bf16"}, {}, {}, ["policy.precision=bf16", "give policy.precision=fp8"]),
        ({"fp8": {"recipe": "tensorwise"}}, {}, {}, ["policy.fp8.recipe=tensorwise", "give policy.fp8.recipe=blockwise"]),
        ({}, {"engines": ["http://host:1"]}, {}, ["rollout.engines names 1 that run already"]),
        ({}, {"round_weights": False}, {}, ["rollout.round_weights=false"]),
        ({}, {}, {"head_dim": 64}, ["head_dim=64 is no multiple of 128", "rollout.weights=auto"]),
        ({}, {}, {"hidden_size": 2560 + 64}, ["hidden_size=2624 is no multiple of 128"]),
        ({"tensor_parallel_size": 8}, {}, {"ffn_hidden_size": 9728}, ["9728 / policy.tensor_parallel_size=8", "lower policy.tensor"]),
        ({}, {"tensor_parallel_size": 8}, {"ffn_hidden_size": 9728}, ["9728 / rollout.tensor_parallel_size=8", "lower rollout"]),
        ({}, {}, {"ffn_hidden_size": 9000}, ["intermediate_size=9000 is no multiple"]),
        ({}, {}, {"family": "llama"}, ["llama models leave out the factors", "rollout.weights=auto"]),
    ],
)
def test_what_would_make_two_policies_is_refused(policy, rollout, changes, parts):
    found = engine_weights_problems(config(policy, **rollout), dataclasses.replace(QWEN3_8B, **changes))
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found


def test_experts_are_cut_by_the_engine_only():
    assert engine_weights_problems(config({"tensor_parallel_size": 4}), QWEN3_30B) == []
    (problem,) = engine_weights_problems(config(tensor_parallel_size=4), QWEN3_30B)
    assert "moe_intermediate_size=768 / rollout.tensor_parallel_size=4" in problem


def test_without_fp8_engines_there_is_nothing_to_refuse():
    assert engine_weights_problems(config({"precision": "bf16"}, weights="auto"), dataclasses.replace(QWEN3_8B, head_dim=64)) == []


def test_the_engine_is_told_what_stays_in_bf16():
    policy = config({"fp8": {"first_layers_bf16": 1, "last_layers_bf16": 2}}).policy
    assert fp8_layers(policy, 36) == range(1, 34)
    told = quantization_config(policy, QWEN3_30B)
    assert told["weight_block_size"] == [128, 128] and told["quant_method"] == "fp8"
    kept = told["modules_to_not_convert"]
    assert kept == ["lm_head", "mlp.gate", "model.layers.0", "model.layers.46", "model.layers.47"]

"""FP8 weights in the engines (`rollout.weights=fp8`): which tensors are quantised, what the engine is told, when it can be.

Policy and engines are one policy only if both multiply the same numbers. A weight of an FP8 policy is rounded in blocks of
128 x 128 of the matrix that a rank multiplies: Megatron's fused one, cut by tensor parallelism. An engine's are blocks of
Hugging Face's tensors. These are the same blocks where every seam between heads, between gate and up projection and between
ranks is a multiple of 128; elsewhere the setting is refused.

The engine is told in the words of Hugging Face's FP8 checkpoints (`quantization_config` in `config.json`), which is what
SGLang's `Fp8Config.from_config` reads: `modules_to_not_convert` are paths, and a layer's path stands for all in it.
"""

from __future__ import annotations

from typing import Any

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import Config, PolicyConfig

BLOCK = 128
NO_SCALES = ("llama",)
"""Families whose `load_weights` in SGLang 0.5.21 renames `weight_scale_inv` to what only per-tensor FP8 has, and drops it with a
warning in the log."""
SCALE_SUFFIX = "_scale_inv"
"""`X.weight` has its blocks' factors in `X.weight_scale_inv`."""


def fp8_layers(policy: PolicyConfig, num_layers: int) -> range:
    """The layers whose linears an FP8 policy multiplies in FP8; they are neighbours."""
    if policy.precision != "fp8":
        return range(0)
    return range(policy.fp8.first_layers_bf16, num_layers - policy.fp8.last_layers_bf16)


def quantization_config(policy: PolicyConfig, architecture: ModelArchitecture) -> dict[str, Any]:
    """What an engine with FP8 weights is told of them: `quantization_config` of a Hugging Face `config.json`."""
    return block_fp8(architecture, fp8_layers(policy, architecture.num_layers))


def block_fp8(architecture: ModelArchitecture, layers: range) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears in `layers` are FP8 numbers with a factor for each block."""
    kept = [f"model.layers.{layer}" for layer in range(architecture.num_layers) if layer not in layers]
    router = ["mlp.gate"] if architecture.num_experts else []
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *router, *kept],
    }


def engine_weights_problems(config: Config, architecture: ModelArchitecture) -> list[str]:
    """Everything that keeps `rollout.weights=fp8` from being what the policy multiplies; empty if nothing does."""
    policy, rollout = config.policy, config.rollout
    if rollout.weights != "fp8":
        return []
    instead = "give rollout.weights=auto"
    if policy.precision != "fp8":
        return [
            f"rollout.weights=fp8 and policy.precision={policy.precision}: the engines would sample from another policy than the one "
            f"trained; give policy.precision=fp8, or rollout.weights=auto"
        ]
    if policy.fp8.recipe != "blockwise":
        return [
            f"rollout.weights=fp8 is in blocks of {BLOCK} x {BLOCK}, policy.fp8.recipe={policy.fp8.recipe} rounds otherwise; give "
            "policy.fp8.recipe=blockwise, or rollout.weights=auto"
        ]
    problems = []
    if rollout.engines:
        problems.append(
            f"rollout.weights=fp8 is for colocated engines, which are started so; rollout.engines names {len(rollout.engines)} that run "
            f"already; {instead}, or leave rollout.engines out"
        )
    if architecture.family in NO_SCALES:
        problems.append(
            f"rollout.weights=fp8: SGLang's {architecture.family} models leave out the factors of block-quantised weights as they load "
            f"them; {instead}"
        )
    if not rollout.round_weights:
        problems.append(f"rollout.round_weights=false and rollout.weights=fp8: FP8 weights are rounded ones; {instead}, or leave it out")
    for what, size, divisor, key in _seams(config, architecture):
        if size % (BLOCK * divisor):
            share = f"{size} / {key}={divisor}" if divisor > 1 else str(size)
            turn = f"lower {key}, or " if divisor > 1 and size % BLOCK == 0 else ""
            problems.append(f"rollout.weights=fp8: the model's {what}={share} is no multiple of {BLOCK}; {turn}{instead}")
    return problems


def _seams(config: Config, architecture: ModelArchitecture) -> list[tuple[str, int, int, str]]:
    """(name, size, ranks it is divided over, the setting that says so) of all that must come out as whole blocks."""
    ours, engines = "policy.tensor_parallel_size", "rollout.tensor_parallel_size"
    cuts = [(config.policy.tensor_parallel_size, ours), (config.rollout.tensor_parallel_size, engines)]
    seams = [("hidden_size", architecture.hidden_size, 1, ""), ("head_dim", architecture.head_dim, 1, "")]
    if architecture.num_experts is None:
        seams += [("intermediate_size", architecture.ffn_hidden_size, *cut) for cut in dict.fromkeys(cuts)]
    else:  # the policy does not cut its experts
        seams.append(("moe_intermediate_size", architecture.expert_ffn_hidden_size, *cuts[1]))
    # One complaint a number: where it is no multiple at all, its shares are not either.
    whole = [seam for seam in seams if seam[1] % BLOCK == 0]
    return whole + list({seam[0]: seam for seam in seams if seam not in whole}.values())

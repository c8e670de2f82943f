"""Which modules the layers are made of: Megatron's layer specs, with this house's modules in their slots.

    core attention   RowAttention; the backend's own where rows are plain sequences
    norms            policy/norm.py where Transformer Engine is not: Megatron's local one refuses sequence parallelism
    activation       policy/swiglu.py where Transformer Engine is not
    linear layers    policy/fp8_linear.py where FP8 is emulated
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.attention import RowAttention
from megatron_spice.policy.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_spice.policy.model_config import Backend
from megatron_spice.policy.norm import RMSNorm
from megatron_spice.policy.swiglu import SwiGLU


def block_spec(
    architecture: ModelArchitecture,
    config: PolicyConfig,
    settings: TransformerConfig,
    backend: Backend,
    sequences: bool,
    virtual_stage: int | None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one chunk and the norm after them.

    Args:
        sequences: rows are plain sequences, for the backend's own attention.
        virtual_stage: which of the rank's chunks; None if there is one.
    """
    core_attention = backend.sequence_attention if sequences else RowAttention
    if backend.uses_te:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.num_experts, moe_grouped_gemm=True, qk_layernorm=architecture.qk_norm
        )
        layer.submodules.self_attention.submodules.core_attention = core_attention
        return layer
    layer = get_gpt_layer_local_spec(
        num_experts=architecture.num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm",
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = core_attention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if architecture.num_experts is not None:
        # Checkpoints name this norm as Transformer Engine's layers do, which fuse it into a dense MLP but not into experts.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    mlp = layer.submodules.mlp.submodules
    if architecture.num_experts is not None:
        mlp = mlp.experts.submodules
    mlp.activation_func = SwiGLU
    if config.precision == "fp8":
        attention.linear_qkv, attention.linear_proj = Fp8ColumnParallelLinear, Fp8RowParallelLinear
        mlp.linear_fc1, mlp.linear_fc2 = Fp8ColumnParallelLinear, Fp8RowParallelLinear
    count = get_num_layers_to_build(settings, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)

"""Megatron's description of the model, from the Hugging Face one; nothing is taken from hand-written flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy import fused, precision
from megatron_spice.policy.recompute import recompute_settings


@dataclass(frozen=True, slots=True)
class Backend:
    """What the layers are made of: Transformer Engine's modules on CUDA, Megatron's local ones elsewhere.

    `sequence_attention` is the core attention for rows of plain sequences, given by their lengths (Megatron's THD format);
    None where there is none, and the row's codes say who attends to whom.
    """

    device: str = "cpu"
    uses_te: bool = False
    sequence_attention: type | None = None

    @classmethod
    def of(cls, device: torch.device) -> Backend:
        """Transformer Engine where there is a GPU and the package."""
        if device.type != "cuda" or not precision.has_transformer_engine():
            return cls(device.type)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return cls(device.type, uses_te=True, sequence_attention=TEDotProductAttention)

    def takes_sequences(self, config: PolicyConfig, layout: ParallelLayout) -> bool:
        """Whether rows go through `sequence_attention`: nothing is shared, and there is no context parallelism, for which
        our rows are cut in another way than it expects."""
        return self.sequence_attention is not None and not config.shared_prefix and layout.context == 1


def transformer_config(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, backend: Backend
) -> TransformerConfig:
    """The settings that all of a rank's chunks share."""
    dtype = precision.DTYPES[config.precision]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=backend.device == "cpu",
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=backend.uses_te,
        bias_dropout_fusion=backend.uses_te,
        use_te_activation_func=not backend.uses_te,  # the slot for an activation in the layer spec, which swiglu.py takes
        gradient_accumulation_fusion=fused.gradient_accumulation_fusion(backend.device, backend.uses_te),
        finalize_model_grads_func=finalize_model_grads,
        # The loss comes as a share of the global one: Megatron is to sum gradients, and to divide by nothing.
        calculate_per_token_loss=True,
        **_parallelism(layout),
        **_experts(architecture, layout, backend),
        **recompute_settings(config),
        **precision.transformer_settings(config, emulated=not backend.uses_te),
    )


def _parallelism(layout: ParallelLayout) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "variable_seq_lengths": layout.pipeline > 1 and not layout.equal_rows,
        "moe_token_dispatcher_type": "alltoall",  # the one that admits rows of unequal length
    }
    if layout.pipeline > 1:
        stages = [["decoder"] * count for count in layout.chunk_layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = stages
    if layout.virtual > 1:
        # Two stages are each other's neighbours on both sides: batched exchanges would be matched wrongly.
        settings |= {
            "virtual_pipeline_model_parallel_size": layout.virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False,
        }  # fmt: skip
    return settings


def _experts(architecture: ModelArchitecture, layout: ParallelLayout, backend: Backend) -> dict[str, Any]:
    """Routing as Hugging Face's Qwen3-MoE does it: logits in the model's own precision, softmax over all
    experts in float32, the best few, renormalised or not; every token is served, and no balance is asked for."""
    if architecture.num_experts is None:
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        # The softmax of the chosen is the softmax of all, chosen and renormalised.
        "moe_router_pre_softmax": not architecture.normalize_expert_weights,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": backend.uses_te,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }

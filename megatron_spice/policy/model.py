"""The policy network: Megatron-Core's GPT model, whose forward takes a packed row and answers with log-probabilities.

The subclass adds no parameters and no layers. It differs from `GPTModel.forward` in three places: rotary embeddings are
picked by each token's own position (rows hold many sequences), attention is `RowAttention` (through the layer spec), and
the output matrix meets only the positions that predict a completion token, a chunk at a time.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.attention import RowAttention
from megatron_spice.policy.logprobs import token_logprobs
from megatron_spice.policy.parallel import ParallelLayout, Placement
from megatron_spice.policy.rows import RowTensors
from megatron_spice.weights.vocabulary import padded_vocabulary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PolicyModel(GPTModel):
    """One pipeline stage of the policy."""

    def __init__(self, *args: object, temperature: float, chunk: int, real_vocab_size: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.chunk = chunk
        self.real_vocab_size = real_vocab_size

    def forward(self, row: RowTensors) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [s, 1, h] on inner stages; on the last one log-probs and entropies, each float32 [c]."""
        rotary = self.rotary_pos_emb(int(row.positions_s.max()) + 1)[row.positions_s]
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=row.ids_s[None], position_ids=row.positions_s[None])
        hidden_s1h = self.decoder(hidden_states=embedded, attention_mask=row.mask_ss, rotary_pos_emb=rotary)
        if not self.post_process:
            return hidden_s1h
        weight = self.output_weight()
        return token_logprobs(
            hidden_s1h[:, 0].index_select(0, row.source_c),
            weight,
            row.labels_c,
            temperature=self.temperature,
            chunk=self.chunk,
            vocab_start=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
            vocab_size=self.real_vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output matrix, [v / tensor parallel, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout
) -> TransformerConfig:
    """Megatron's description of the model, from the Hugging Face one; nothing is taken from hand-written flags."""
    dtype = DTYPES[config.precision]
    recompute = {}
    if config.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the only one that variable lengths admit; unused by dense models
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.precision == "bf16",
        use_cpu_initialization=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
        **recompute,
    )


def layer_spec(architecture: ModelArchitecture) -> ModuleSpec:
    """Megatron's local layer with our core attention in its slot."""
    spec = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = RowAttention
    return spec


def build_model(
    architecture: ModelArchitecture,
    config: PolicyConfig,
    layout: ParallelLayout,
    placement: Placement,
    temperature: float,
) -> PolicyModel:
    """This rank's stage, with weights not yet loaded."""
    model = PolicyModel(
        transformer_config(architecture, config, layout),
        layer_spec(architecture),
        vocab_size=padded_vocabulary(architecture.vocab_size, layout.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=placement.is_first_stage,
        post_process=placement.is_last_stage,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling is not None,  # Llama 3's, which is what config/hf.py lets through
        rope_scaling_factor=(architecture.rope_scaling or {}).get("factor", 8.0),
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        temperature=temperature,
        chunk=config.logprob_chunk,
        real_vocab_size=architecture.vocab_size,
    )
    return model.to(DTYPES[config.precision])

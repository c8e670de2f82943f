"""The policy network: Megatron-Core's GPT model, whose forward takes a packed row and answers with log-probabilities.

The subclass adds no parameters and no layers. It differs from `GPTModel.forward` in three places: rotary embeddings are
picked by each token's own position (rows hold many sequences), attention is told who attends to whom by the row's codes,
and the output matrix meets only the positions that predict a completion token, a chunk at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy import chance, precision
from megatron_spice.policy.logprobs import token_logprobs
from megatron_spice.policy.model_config import Backend, transformer_config
from megatron_spice.policy.model_spec import block_spec
from megatron_spice.policy.parallel import Placement
from megatron_spice.policy.rows import RowTensors
from megatron_spice.weights.vocabulary import padded_vocabulary


class PolicyModel(GPTModel):
    """One chunk of the policy's layers."""

    def __init__(
        self, *args: Any, temperature: float, chunk: int, real_vocab_size: int, sequences: bool, entropy_grad: bool, **kwargs: Any
    ) -> None:
        """
        Args:
            sequences: attention takes the lengths of the row's sequences and not its codes.
            entropy_grad: entropies are differentiable.
        """
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.chunk = chunk
        self.real_vocab_size = real_vocab_size
        self.sequences = sequences
        self.entropy_grad = entropy_grad

    def forward(self, row: RowTensors) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [s, 1, h] on inner stages; on the last one log-probs and entropies, each float32 [c]."""
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=row.ids_s[None], position_ids=row.positions_s[None])
        hidden_s1h = self.decoder(
            hidden_states=embedded,
            attention_mask=None if self.sequences else row.codes_k3,
            rotary_pos_emb=self._rotary(row),
            packed_seq_params=_packed(row) if self.sequences else None,
        )
        if not self.post_process:
            return hidden_s1h
        if self.config.sequence_parallel:
            # The log-probabilities' gradient is already summed over the group, so backward only takes its own part.
            hidden_s1h = gather_from_sequence_parallel_region(hidden_s1h, tensor_parallel_output_grad=False)
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
            with_entropy_grad=self.entropy_grad,
        )

    def _rotary(self, row: RowTensors) -> torch.Tensor:
        """Angles [s, 1, 1, d] of the tokens' positions; for plain sequences those of the longest, [longest, 1, 1, d].

        `packed_seq` keeps Megatron from cutting the angles up for context parallelism as if the row were one sequence. The
        length is rounded up because Megatron keeps the angles of each length it was asked for.
        """
        longest = max(row.lengths) if self.sequences else int(row.positions_s.max()) + 1
        angles = self.rotary_pos_emb(-(-longest // 1024) * 1024, packed_seq=True)
        return angles if self.sequences else angles[row.positions_s]

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output matrix, [v / tensor parallel, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def _packed(row: RowTensors) -> PackedSeqParams:
    """The row as Transformer Engine's THD attention wants it: where each sequence begins."""
    assert row.lengths is not None, "a row with shared prompts has no plain sequences"
    starts = torch.tensor([0, *row.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(row.ids_s.device)
    longest = max(row.lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def build_chunks(
    architecture: ModelArchitecture,
    config: PolicyConfig,
    layout: ParallelLayout,
    placement: Placement,
    temperature: float,
    backend: Backend = Backend(),
) -> list[PolicyModel]:
    """This rank's chunks of layers in the model's order, with weights not yet loaded; all share one Megatron config."""
    settings = transformer_config(architecture, config, layout, backend)
    chunks = [
        _build_chunk(architecture, config, settings, layout, placement, temperature, backend, index)
        for index in range(layout.virtual)
    ]
    precision.prepare_layers(chunks, config)
    chance.assert_draws_nothing(chunks)
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if ".experts." in name:
            # Reduced over the ranks with the same experts. Megatron marks them only with several expert-parallel ranks, but
            # tensor-parallel ranks see different tokens even without; and the optimiser's parts are then always the same.
            parameter.allreduce = False
    return chunks


def _build_chunk(
    architecture: ModelArchitecture,
    config: PolicyConfig,
    settings: TransformerConfig,
    layout: ParallelLayout,
    placement: Placement,
    temperature: float,
    backend: Backend,
    index: int,
) -> PolicyModel:
    sequences = backend.takes_sequences(config, layout)
    model = PolicyModel(
        settings,
        block_spec(architecture, config, settings, backend, sequences, index if layout.virtual > 1 else None),
        vocab_size=padded_vocabulary(architecture.vocab_size, layout.tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=placement.is_first_stage and index == 0,
        post_process=placement.is_last_stage and index == layout.virtual - 1,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling is not None,  # Llama 3's, which is what config/hf.py lets through
        rope_scaling_factor=(architecture.rope_scaling or {}).get("factor", 8.0),
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        vp_stage=index if layout.virtual > 1 else None,
        temperature=temperature,
        chunk=config.logprob_chunk,
        real_vocab_size=architecture.vocab_size,
        sequences=sequences,
        entropy_grad=config.entropy_bonus > 0,
    )
    return model.to(precision.DTYPES[config.precision])

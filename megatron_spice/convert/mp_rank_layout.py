"""Megatron-LM's directories of a file for each rank (`--ckpt-format torch`): their names, and what lies in them.

    latest_checkpointed_iteration.txt           `10`, or `release` for weights without an optimiser
    iter_0000010/mp_rank_TT/model_optim_rng.pt  TT: tensor rank; `_PPP` follows with several pipeline stages, `_EEE` with several
                                                expert-parallel ranks

A file is a pickle with `args` (the command line that it was trained with), `checkpoint_version` and `model`, or `model0`,
`model1`, ... for the chunks of a virtual pipeline; each is a state dict by the names of the rank's own modules. Every
expert-parallel rank's file has the dense layers too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout, divisors, tensor_problems
from megatron_spice.weights.names import Entry
from megatron_spice.weights.stage import Key, Stage
from megatron_spice.weights.vocabulary import ROWS_PER_RANK, padded_vocabulary

FILE = "model_optim_rng.pt"
RELEASE = "release"
VERSION = 3.0
LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


class Seat(NamedTuple):
    """A rank that writes a file: its numbers among the tensor, pipeline and expert ranks."""

    tensor: int
    pipeline: int
    expert: int


def folder_name(seat: Seat, layout: ParallelLayout) -> str:
    """`mp_rank_TT[_PPP][_EEE]`."""
    name = f"mp_rank_{seat.tensor:02d}"
    if layout.pipeline > 1:
        name += f"_{seat.pipeline:03d}"
    if layout.expert > 1:
        name += f"_{seat.expert:03d}"
    return name


def seats(layout: ParallelLayout) -> Iterator[Seat]:
    """All ranks that write: with experts cut like dense layers, which is Megatron-LM's default, each has others."""
    for pipeline in range(layout.pipeline):
        for expert in range(layout.expert):
            yield from (Seat(tensor, pipeline, expert) for tensor in range(layout.tensor))


def chunk_keys(virtual: int) -> list[str]:
    """Under which keys a file has its chunks of layers."""
    return ["model"] if virtual == 1 else [f"model{index}" for index in range(virtual)]


def key_of(entry: Entry, stage: Stage, implementation: str) -> Key | None:
    """The name an entry has on a stage made of these layers, None where it is not held."""
    keys = stage.keys(entry)
    return keys[0 if implementation == LOCAL else -1] if keys else None


def make_layout(architecture: ModelArchitecture, tensor: int, pipeline: int, virtual: int, expert: int) -> ParallelLayout:
    """A layout as Megatron-LM divides models: equally.

    Raises:
        ValueError: it does not fit the model; the message says which number divides not what.
    """
    a, problems = architecture, []
    problems += tensor_problems("--tensor-parallel-size", tensor, architecture)
    if a.num_experts is not None and a.expert_ffn_hidden_size % tensor:
        fits = divisors(a.expert_ffn_hidden_size)
        problems.append(
            f"--tensor-parallel-size={tensor} does not divide the model's moe_intermediate_size={a.expert_ffn_hidden_size}; "
            f"choose one of {fits}"
        )
    if virtual > 1 and pipeline == 1:
        problems.append(f"--virtual-pipeline-parallel-size={virtual} needs --pipeline-parallel-size of 2 or more")
    chunks = pipeline * virtual
    if a.num_layers % chunks:
        problems.append(
            f"--pipeline-parallel-size={pipeline} x --virtual-pipeline-parallel-size={virtual} = {chunks} does not divide the model's "
            f"num_hidden_layers={a.num_layers}; make it one of {divisors(a.num_layers)}"
        )
    if expert > 1 and (a.num_experts is None or a.num_experts % expert):
        what = "has no experts" if a.num_experts is None else f"has num_experts={a.num_experts}, which it does not divide"
        problems.append(f"--expert-parallel-size={expert}, but the model {what}")
    if problems:
        raise ValueError("; ".join(problems))
    return ParallelLayout((a.num_layers // chunks,) * chunks, tensor, pipeline, expert=expert)


def arguments(
    architecture: ModelArchitecture, layout: ParallelLayout, dtype: str, implementation: str
) -> argparse.Namespace:
    """The `args` of a file: what Megatron-LM's `load_args_from_checkpoint` and `check_checkpoint_args` look at."""
    a = architecture
    values = {"ffn_hidden_size": a.ffn_hidden_size} | model_arguments(architecture) | {
        "add_position_embedding": False, "position_embedding_type": "rope", "use_rotary_position_embeddings": False,
        "rotary_percent": 1.0, "rotary_interleaved": False, "use_rope_scaling": a.rope_scaling is not None,
        "rope_scaling_factor": (a.rope_scaling or {}).get("factor", 8.0), "group_query_attention": True,
        "squared_relu": False, "apply_layernorm_1p": False, "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "seq_length": a.max_position_embeddings,
        "max_position_embeddings": a.max_position_embeddings, "moe_grouped_gemm": bool(a.num_experts) and implementation != LOCAL,
        "moe_layer_freq": 1, "moe_router_pre_softmax": not a.normalize_expert_weights, "moe_shared_expert_intermediate_size": None,
        "make_vocab_size_divisible_by": ROWS_PER_RANK, "padded_vocab_size": padded_vocabulary(a.vocab_size, layout.tensor),
        "vocab_size": a.vocab_size, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": None,
        "tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": layout.chunk_layers[0] if layout.virtual > 1 else None,
        "expert_model_parallel_size": layout.expert, "expert_tensor_parallel_size": layout.tensor, "context_parallel_size": 1,
        "transformer_impl": implementation, "ckpt_format": "torch", "use_dist_ckpt": False, "iteration": 0,
        "bf16": dtype == "bfloat16", "fp16": dtype == "float16", "consumed_train_samples": 0, "consumed_valid_samples": 0,
        "skipped_train_samples": 0, "data_parallel_random_init": False,
    }  # fmt: skip
    return argparse.Namespace(**values)


def model_arguments(architecture: ModelArchitecture) -> dict[str, object]:
    """The arguments that say which model it is, by Megatron-LM's names."""
    a = architecture
    values: dict[str, object] = {
        "num_layers": a.num_layers, "hidden_size": a.hidden_size, "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups, "kv_channels": a.head_dim, "normalization": "RMSNorm",
        "norm_epsilon": a.norm_epsilon, "rotary_base": int(a.rope_theta), "swiglu": True, "add_bias_linear": False,
        "add_qkv_bias": a.qkv_bias, "qk_layernorm": a.qk_norm, "untie_embeddings_and_output_weights": not a.tied_embeddings,
        "num_experts": a.num_experts,
    }  # fmt: skip
    if a.num_experts is None:
        return values | {"ffn_hidden_size": a.ffn_hidden_size}
    # Not `ffn_hidden_size`: no layer of a mixture has it, and people give it what they like.
    return values | {"moe_ffn_hidden_size": a.expert_ffn_hidden_size, "moe_router_topk": a.experts_per_token}

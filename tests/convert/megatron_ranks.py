"""What the tests against Megatron-Core do on its ranks: its own GPT model, its own loading and saving."""

from __future__ import annotations

import queue
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def take_over(jobs: list[dict[str, Any]]) -> list[list[str]]:
    """For each job makes the ranks' GPT models, loads this rank's file of `ranks` strictly, and saves what they then have:
    as files for each rank into `again`, and by dist_checkpointing into `dist`. Returns the names of each chunk's state."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [_one(job) for job in jobs]


def _one(job: dict[str, Any]) -> list[str]:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.layout import ParallelLayout
    from megatron_spice.convert.mp_rank_layout import FILE, Seat, chunk_keys, folder_name

    tensor, pipeline, virtual, expert = (job["layout"].get(key, 1) for key in ("tensor", "pipeline", "virtual", "expert"))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_tensor_parallel_size=job.get("expert_tensor", tensor),
    )  # fmt: skip
    architecture = read_architecture(Path(job["hf"]))
    sizes = (tensor, pipeline, virtual, expert, job.get("expert_tensor", tensor))
    chunks = [_chunk(architecture, *sizes, index, "metadata" not in job) for index in range(virtual)]
    seat = Seat(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )  # fmt: skip
    layers = architecture.num_layers // (pipeline * virtual)
    layout = ParallelLayout((layers,) * (pipeline * virtual), tensor, pipeline, expert=expert)
    name = folder_name(seat, layout)
    keys = chunk_keys(virtual)
    if "ranks" in job:
        state = torch.load(Path(job["ranks"]) / "release" / name / FILE, weights_only=False)
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(state[key], strict=True)
    elif "from" in job:
        loaded = dist_checkpointing.load({"model": [chunk.sharded_state_dict() for chunk in chunks]}, str(Path(job["from"]) / "weights"))
        for chunk, state in zip(chunks, loaded["model"]):
            chunk.load_state_dict(state)
    if "again" in job:
        path = Path(job["again"]) / "iter_0000007" / name / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        states = {key: chunk.state_dict() for key, chunk in zip(keys, chunks)}
        args = Namespace(num_layers=architecture.num_layers, pipeline_model_parallel_size=pipeline, somewhere=Path("/some/where"))
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "optimizer": {"exp_avg": torch.ones(3)}, **states}, path)
        (Path(job["again"]) / "latest_checkpointed_iteration.txt").write_text("7\n")
    if "dist" in job:
        Path(job["dist"]).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        # Megatron's writer would start a process for its results, of use only when the save itself runs in another one.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        told = {key: True for key in job.get("metadata", ())}
        dist_checkpointing.save({"model": [chunk.sharded_state_dict(metadata=dict(told)) for chunk in chunks]}, job["dist"])
    parallel_state.destroy_model_parallel()
    return [f"{key}.{each}" for key, chunk in zip(keys, chunks) for each in chunk.state_dict()]


def _chunk(a: Any, tensor: int, pipeline: int, virtual: int, expert: int, expert_tensor: int, index: int, te_names: bool) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_spice.weights.vocabulary import padded_vocabulary

    experts = {} if a.num_experts is None else {
        "num_moe_experts": a.num_experts, "moe_ffn_hidden_size": a.expert_ffn_hidden_size, "moe_router_topk": a.experts_per_token,
        "expert_model_parallel_size": expert, "expert_tensor_parallel_size": expert_tensor,
    }  # fmt: skip
    config = TransformerConfig(
        num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size, kv_channels=a.head_dim,
        num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm, use_cpu_initialization=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True,
        persist_layer_norm=False, bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None, **experts,
    )  # fmt: skip
    stage = index if virtual > 1 else None
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
    for layer in spec.layer_specs if experts and te_names else ():  # Transformer Engine's layers do not fuse this norm
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return GPTModel(
        config, spec,
        vocab_size=padded_vocabulary(a.vocab_size, tensor), max_sequence_length=a.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=a.tied_embeddings, position_embedding_type="rope", vp_stage=stage,
    ).bfloat16()  # fmt: skip

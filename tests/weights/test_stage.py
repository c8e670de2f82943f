"""What a rank holds: in any layout every tensor has its place, and one owner that has it."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DENSE, MIXTURE

from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.plan import plan_buckets
from megatron_spice.weights.load import fill
from megatron_spice.weights.names import hf_shapes, table
from megatron_spice.weights.stage import Stage, stage_parameters


@st.composite
def cases(draw):
    """An architecture and a layout that fits it: any number of layers a chunk, any number of chunks."""
    pipeline = draw(st.integers(1, 3))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    chunks = draw(st.lists(st.integers(1, 3), min_size=pipeline * virtual, max_size=pipeline * virtual))
    base = draw(st.sampled_from([DENSE, MIXTURE]))
    expert = draw(st.sampled_from([1, 2, 3, 6])) if base.num_experts else 1
    architecture = dataclasses.replace(base, num_layers=sum(chunks), tied_embeddings=draw(st.booleans()))
    return architecture, ParallelLayout(tuple(chunks), pipeline=pipeline, expert=expert)


def stages(architecture, layout):
    return [
        Stage(rank, layout, expert_rank, architecture.num_experts)
        for rank in range(layout.pipeline)
        for expert_rank in range(layout.expert)
    ]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_entry_is_held_where_its_owner_is(case):
    architecture, layout = case
    ranks = stages(architecture, layout)
    for entry in table(architecture):
        holders = {(rank.rank, rank.expert_rank) for rank in ranks if rank.keys(entry)}
        stage, expert_rank = ranks[0].owner(entry)
        assert (stage, expert_rank) in holders
        on_stages, on_experts = {stage for stage, _ in holders}, {expert for _, expert in holders}
        tied_twice = entry.stage == "both" and len(layout.chunk_layers) > 1
        assert on_stages == ({0, layout.pipeline - 1} if tied_twice else {stage})
        assert on_experts == ({expert_rank} if entry.expert is not None else set(range(layout.expert)))


@settings(max_examples=30, deadline=None)
@given(cases())
def test_numbers_of_layers_and_experts_start_again_in_each_chunk(case):
    architecture, layout = case
    for rank in stages(architecture, layout):
        for choice in (0, -1):  # Megatron's own names, and Transformer Engine's
            keys = Counter(keys[choice] for entry in table(architecture) if (keys := rank.keys(entry)))
            assert max(keys.values()) == 1, "two entries have one key"
        for local in range(layout.virtual):
            names = {name for chunk, name in keys if chunk == local and ".layers." in name}
            layers = {int(name.split(".")[2]) for name in names}
            assert layers == set(range(layout.chunk_layers[local * layout.pipeline + rank.rank]))
            weights = {name for name in names if "mlp.experts" in name and ".layers.0." in name}
            assert len(weights) == 2 * (architecture.num_experts or 0) // layout.expert
    assert {chunk for chunk, _ in keys} == set(range(layout.virtual))


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 40_000))
def test_the_plan_has_every_tensor_once(case, max_elements):
    architecture, layout = case
    plan = plan_buckets(architecture, layout, max_elements)
    expected = {name: shape for entry in table(architecture) for name, shape in hf_shapes(entry, architecture).items()}
    assert {name: shape for bucket in plan for name, shape in bucket.shapes.items()} == expected
    assert sum(len(bucket.shapes) for bucket in plan) == len(expected)
    for bucket in plan:
        assert bucket.entries and (bucket.num_elements <= max_elements * 9 // 8 or len(bucket.entries) == 1)
        for rank in stages(architecture, layout):
            if rank.rank == bucket.stage and bucket.expert_rank in (None, rank.expert_rank):
                assert all(rank.keys(entry) for entry in bucket.entries)
    for one, other in zip(plan, plan[1:]):  # no bucket ends before it must
        if (one.stage, one.expert_rank) == (other.stage, other.expert_rank):
            first = sum(torch.Size(shape).numel() for shape in hf_shapes(other.entries[0], architecture).values())
            assert one.num_elements + first > max_elements


def test_transformer_engines_names_are_found():
    architecture = dataclasses.replace(MIXTURE, num_layers=1)
    stage = Stage(0, ParallelLayout((1,)), 0, architecture.num_experts)
    keys = {entry.hf[0]: stage.keys(entry) for entry in table(architecture)}
    layer = "decoder.layers.0."
    for hf, name in {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.experts.5.gate_proj.weight": "mlp.experts.linear_fc1.weight5",
        "mlp.experts.5.down_proj.weight": "mlp.experts.linear_fc2.weight5",
    }.items():
        assert keys["model.layers.0." + hf][-1] == (0, layer + name)
    dense = {entry.hf[0]: entry for entry in table(dataclasses.replace(DENSE, num_layers=1))}
    fused = dense["model.layers.0.post_attention_layernorm.weight"]
    assert stage.key(fused, {(0, layer + "mlp.linear_fc1.layer_norm_weight")}) == (
        0, layer + "mlp.linear_fc1.layer_norm_weight",
    )  # fmt: skip


def small_stage():
    architecture = dataclasses.replace(DENSE, num_layers=2)
    stage = Stage(0, ParallelLayout((2,)))
    source, parameters = {}, {}
    for entry in table(architecture):
        source |= {name: torch.randn(shape) for name, shape in hf_shapes(entry, architecture).items()}
        parameters[stage.keys(entry)[0]] = torch.zeros(whole_shape(entry, architecture))
    return architecture, stage, source, parameters


def whole_shape(entry, architecture):
    shapes = list(hf_shapes(entry, architecture).values())
    rows = 384 if entry.kind == "vocabulary" else sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])


@pytest.mark.parametrize("change, words", [
    (lambda p: p.pop((0, "decoder.final_layernorm.weight")), "chunk 0 of stage 0 has no parameter decoder.final_layernorm"),
    (lambda p: p.update({(0, "stranger"): torch.zeros(1)}), "does not know.*stranger"),
    (lambda p: p.update({(0, "decoder.final_layernorm.weight"): torch.zeros(2, 24)}), r"shape \(2, 24\).*\(24,\)"),
])  # fmt: skip
def test_a_model_that_differs_from_the_table_is_refused(change, words):
    architecture, stage, source, parameters = small_stage()
    fill(parameters, source, table(architecture), architecture, stage, 0, 1)
    change(parameters)
    with pytest.raises(ValueError, match=words):
        fill(parameters, source, table(architecture), architecture, stage, 0, 1)


def test_parameters_are_keyed_by_chunk():
    chunks = [torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 3, bias=False)]
    parameters = stage_parameters(chunks)
    assert list(parameters) == [(0, "weight"), (1, "weight")] and parameters[1, "weight"] is chunks[1].weight

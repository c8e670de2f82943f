"""The layout object: layers are dealt out whole and evenly, and what does not fit is told with its number and a remedy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout, divisors, layout_problems, spread_layers
from megatron_spice.config.schema import PolicyConfig

DENSE = {
    "model_type": "qwen3", "num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 403, "max_position_embeddings": 256,
}  # fmt: skip
MIXTURE = DENSE | {
    "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 33,
    "intermediate_size": 95,
}  # fmt: skip


def policy(**settings: object) -> PolicyConfig:
    return PolicyConfig.model_validate({"model": "model", **settings})


def degrees(tensor=1, pipeline=1, virtual=1, context=1, expert=1, **more: object) -> PolicyConfig:
    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
    return policy(**{f"{name}_parallel_size": size for name, size in sizes.items()}, virtual_pipeline_size=virtual, **more)


def architecture(config: dict = DENSE, **change: object) -> ModelArchitecture:
    return ModelArchitecture.from_config(config | change)


# -- layers over chunks ----------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 40))
def test_layers_are_spread_evenly_and_the_outer_chunks_have_the_fewest(layers, chunks):
    counts = spread_layers(layers, chunks)
    assert len(counts) == chunks and sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    more = [index for index, count in enumerate(counts) if count > min(counts)]
    if layers % chunks:
        assert more == list(range(more[0], more[-1] + 1)), "the fuller chunks are next to each other"
        assert abs(more[0] - (chunks - 1 - more[-1])) <= 1, "and in the middle"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_every_layer_is_in_the_chunk_that_has_it(counts):
    layout = ParallelLayout(tuple(counts), pipeline=len(counts))
    assert [layer for chunk in range(len(counts)) for layer in layout.layers_of(chunk)] == list(range(sum(counts)))
    for layer in range(layout.num_layers):
        assert layer in layout.layers_of(layout.chunk_of(layer))


# -- layouts that fit -------------------------------------------------------------------------------------------------


@given(st.data())
def test_what_adds_up_is_accepted_and_nothing_else(data):
    mixture = data.draw(st.booleans())
    model = architecture(MIXTURE if mixture else DENSE, num_hidden_layers=data.draw(st.integers(1, 12)))
    choices = {"tensor": [1, 2, 3, 4], "pipeline": [1, 2, 3], "virtual": [1, 2], "context": [1, 2], "expert": [1, 2, 3, 4]}
    sizes = {name: data.draw(st.sampled_from(values)) for name, values in choices.items()}
    shard = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    world = shard * data.draw(st.integers(1, 3)) + data.draw(st.sampled_from([0, 0, 0, 1]))
    config = degrees(**sizes)
    dealt = 6 % sizes["expert"] == 0 and world // sizes["pipeline"] % sizes["expert"] == 0
    fits = (
        world % shard == 0
        and 4 % sizes["tensor"] == 0
        and sizes["pipeline"] * sizes["virtual"] <= model.num_layers
        and (sizes["virtual"] == 1 or sizes["pipeline"] > 1)
        and (dealt if mixture else sizes["expert"] == 1)
    )
    assert (layout_problems(config, model, world) == []) == fits
    if fits:
        layout = ParallelLayout.of(config, model, world)
        assert layout.world_size == world and layout.num_layers == model.num_layers
        assert (layout.virtual, layout.pipeline) == (sizes["virtual"], sizes["pipeline"])
        assert min(layout.chunk_layers) >= 1
        assert layout.row_multiple % (2 * layout.context if layout.context > 1 else 1) == 0
        assert layout.row_multiple % (layout.tensor if layout.sequence_parallel else 1) == 0


def test_given_layers_are_taken():
    layout = ParallelLayout.of(degrees(pipeline=2, virtual=2, pipeline_layers=[1, 2, 2, 1]), architecture(), 4)
    assert (layout.chunk_layers, layout.virtual, layout.data) == ((1, 2, 2, 1), 2, 2)


@pytest.mark.parametrize("settings, model, world, words", [
    ({}, DENSE, 1, "TP=1 PP=1 DP=1"),
    ({"tensor": 2, "pipeline": 2, "context": 2}, DENSE, 16, "TP=2+SP PP=2 CP=2 DP=2"),
    ({"tensor": 2, "sequence_parallel": False}, DENSE, 2, "TP=2 PP=1 DP=1"),
    ({"pipeline": 2, "virtual": 2}, DENSE, 2, "TP=1 PP=2 VP=2 (layers 1 2 2 1) DP=1"),
    ({"expert": 2}, MIXTURE, 4, "TP=1 PP=1 EP=2 DP=4"),
])  # fmt: skip
def test_a_layout_in_words(settings, model, world, words):
    assert ParallelLayout.of(degrees(**settings), architecture(model), world).describe() == words


def test_without_tensor_parallelism_nothing_is_split_along_the_sequence():
    assert not ParallelLayout.of(degrees(sequence_parallel=True), architecture(), 1).sequence_parallel


# -- layouts that do not ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, model, world, parts", [
    ({"pipeline": 3}, DENSE, 4, ["policy.pipeline_parallel_size=3", "= 3 does not divide the 4 ranks", "[1, 2, 4]"]),
    ({"pipeline": 2, "context": 3}, DENSE, 4, ["context_parallel_size=3", "= 6 does not divide the 4 ranks"]),
    ({"tensor": 8}, DENSE, 8, ["policy.tensor_parallel_size=8", "num_key_value_heads=4", "[1, 2, 4]"]),
    ({"tensor": 3}, DENSE, 3, ["policy.tensor_parallel_size=3", "num_attention_heads=8", "[1, 2, 4]"]),
    ({"tensor": 4}, DENSE | {"intermediate_size": 98}, 4, ["intermediate_size=98", "[1, 2]"]),
    ({"pipeline": 8}, DENSE, 8, ["pipeline_parallel_size=8", "num_hidden_layers=6", "lower"]),
    ({"pipeline": 2, "virtual": 4}, DENSE, 2, ["virtual_pipeline_size=4", "= 8", "num_hidden_layers=6", "lower"]),
    ({"virtual": 2}, DENSE, 1, ["policy.virtual_pipeline_size=2", "policy.pipeline_parallel_size", "2 or more", "give 1"]),
    ({"pipeline": 2, "pipeline_layers": [6]}, DENSE, 2, ["pipeline_layers=[6]", "1 numbers", "need 2"]),
    ({"pipeline": 2, "pipeline_layers": [2, 3]}, DENSE, 2, ["pipeline_layers=[2, 3]", "adds up to 5", "num_hidden_layers=6"]),
    ({"expert": 2}, DENSE, 2, ["policy.expert_parallel_size=2", "no experts", "give 1"]),
    ({"expert": 4}, MIXTURE, 4, ["policy.expert_parallel_size=4", "num_experts=6", "[1, 2, 3, 6]"]),
    ({"expert": 3, "pipeline": 2}, MIXTURE, 4, ["policy.expert_parallel_size=3", "2 ranks of a pipeline stage", "[1, 2]"]),
    ({"tensor": 2, "sequence_parallel": False}, MIXTURE, 2, ["tensor_parallel_size=2", "policy.sequence_parallel=true"]),
    ({"precision": "fp8", "fp8": {"first_layers_bf16": 4, "last_layers_bf16": 2}}, DENSE, 1,
     ["first_layers_bf16=4", "last_layers_bf16=2", "num_hidden_layers=6", "lower them"]),
    ({"precision": "fp8", "fp8": {"first_layers_bf16": 1, "recipe": "delayed"}}, DENSE, 1,
     ["policy.fp8.recipe=delayed", "first_layers_bf16=0", "recipe=blockwise"]),
])  # fmt: skip
def test_what_does_not_fit_is_told_with_its_number_and_a_remedy(settings, model, world, parts):
    with pytest.raises(ConfigError) as caught:
        ParallelLayout.of(degrees(**settings), architecture(model), world)
    [problem] = caught.value.problems
    for part in parts:
        assert part in problem, problem


def test_everything_is_told_at_once():
    problems = layout_problems(degrees(tensor=3, virtual=2, expert=4, context=2), architecture(MIXTURE), 4)
    assert len(problems) >= 4


def test_expert_weights_are_not_cut_so_their_width_may_be_odd():
    assert layout_problems(degrees(tensor=2), architecture(MIXTURE), 2) == []


@given(st.integers(1, 500))
def test_divisors(number):
    found = divisors(number)
    assert found == sorted(set(found)) and all(number % divisor == 0 for divisor in found)
    assert {number // divisor for divisor in found} == set(found) and len(found) <= 2 * math.isqrt(number)


# -- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules, model, named", [
    (["moe"], DENSE, "give mlp"), (["core_attn", "mlp"], MIXTURE, "give moe"), (["layernorm"], DENSE, "layernorm"),
    (["core_attn", "mlp"], DENSE, None), (["moe", "layernorm"], MIXTURE, None),
])  # fmt: skip
def test_modules_that_would_not_be_recomputed_are_refused(modules, model, named):
    problems = layout_problems(policy(recompute="selective", recompute_modules=modules), architecture(model), 1)
    assert (problems == []) if named is None else (len(problems) == 1 and named in problems[0])


def test_layers_kept_out_of_fp8_fit_a_stage():
    config = degrees(pipeline=3, precision="fp8", fp8={"first_layers_bf16": 3})
    [problem] = layout_problems(config, architecture(), 3)
    assert "first_layers_bf16=3" in problem and "2 layers" in problem

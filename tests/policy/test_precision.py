"""FP8 layers multiply what the quantiser gives, in every layout; and what is said about precisions is what ran."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_models import make_model, some_trajectories

from megatron_spice.config.fp8_needs import fp8_obstacles
from megatron_spice.policy.precision_audit import LayerPrecision, audit_lines
from megatron_spice.weights import fp8

ON_RANKS = Path(__file__).with_name("fp8_on_ranks.py")
KINDS = ("column", "row")
RECIPES = ("blockwise", "hybrid", "tensorwise")
TOKENS, INPUTS, OUTPUTS = 150, 512, 256  # a partial block of tokens


def tensors(dtype: torch.dtype, tokens: int = TOKENS, inputs: int = INPUTS, outputs: int = OUTPUTS) -> dict[str, torch.Tensor]:
    """Numbers of so many sizes that which block they are in shows: powers of two shift FP8's numbers, and only what falls
    below the smallest of them tells one factor from another."""
    generator = torch.Generator().manual_seed(0)

    def spread(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * torch.exp2(torch.rand(shape, generator=generator) * 20 - 12)

    x, weight, dy = spread(tokens, 1, inputs), spread(outputs, inputs) * 0.02, spread(tokens, 1, outputs) * 1e-4
    return {"x": x.to(dtype), "weight": weight.to(dtype), "dy": dy.to(dtype)}


def compute(world_size: int, jobs: dict[Any, tuple[str, dict[str, Any]]]) -> dict[Any, Any]:
    """Results of rank 0 by key."""
    return dict(zip(jobs, run_ranks(world_size, ON_RANKS, "run", list(jobs.values()))[0]))


@pytest.fixture(scope="session")
def alone() -> dict[Any, Any]:
    """Single layers and settings, on one rank."""
    jobs: dict[Any, tuple[str, dict[str, Any]]] = {}
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            for recipe in (*RECIPES, None):
                jobs[kind, recipe, dtype] = ("linear", {"kind": kind, "recipe": recipe, **tensors(dtype)})
        for recipe in ("blockwise", "tensorwise"):
            nothing = {"recipe": recipe, "expert": True, **tensors(torch.bfloat16, tokens=0)}
            jobs[kind, "empty", recipe] = ("linear", {"kind": kind, **nothing})
        bias = {"bias": torch.linspace(-1, 1, OUTPUTS).bfloat16(), "recipe": "blockwise", **tensors(torch.bfloat16)}
        jobs[kind, "bias"] = ("linear", {"kind": kind, **bias})
        jobs[kind, "skip"] = ("linear", {"kind": kind, "skip_bias_add": True, **bias})
    for recipe in ("blockwise", "tensorwise", "delayed"):
        kept = {} if recipe == "delayed" else {"first_layers_bf16": 1, "last_layers_bf16": 2}
        jobs["settings", recipe] = ("settings", {"precision": "fp8", "fp8": {"recipe": recipe, "format": "hybrid", **kept}})
    jobs["settings", "bf16"] = ("settings", {"precision": "bf16"})
    degrees = {"precision": "fp8", "tensor_parallel_size": 2, "context_parallel_size": 2}
    jobs["settings", "TP"] = ("settings", degrees)
    jobs["settings", "TP without SP"] = ("settings", degrees | {"sequence_parallel": False})
    for recipe in ("blockwise", "delayed"):
        told = {"fp8": "e4m3", "fp8_recipe": recipe, "first_last_layers_bf16": recipe == "blockwise",
                "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}  # fmt: skip
        jobs["Megatron", recipe] = ("accepted_by_megatron", told)
    jobs["Megatron", "typo"] = ("accepted_by_megatron", {"fp8_recipes": "blockwise"})
    jobs["forgotten"] = ("forgotten_recipe", {"precision": "fp8"})
    jobs["engine"] = ("engine_audit", {})
    return compute(1, jobs)


@pytest.fixture(scope="session")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Whole policies after an update, on one rank."""
    jobs: dict[Any, tuple[str, dict[str, Any]]] = {}
    folder = tmp_path_factory.mktemp("model")
    dense, mixture = make_model(folder / "dense", "qwen2", True), make_model(folder / "mixture", "qwen3_moe", False)
    update = {"trajectories": some_trajectories()}
    for name, settings in {
        "bf16": {"precision": "bf16"}, "fp8": {"precision": "fp8"}, "recompute": {"precision": "fp8", "recompute": "full"},
        "kept": {"precision": "fp8", "fp8": {"first_layers_bf16": 1, "last_layers_bf16": 1}},
        "hybrid": {"precision": "fp8", "fp8": {"format": "hybrid"}},
        "tensorwise": {"precision": "fp8", "fp8": {"recipe": "tensorwise"}},
    }.items():  # fmt: skip
        jobs["policy", name] = ("policy", {"model": dense, "settings": settings, **update})
    for name in ("bf16", "fp8"):
        jobs["mixture", name] = ("policy", {"model": mixture, "settings": {"precision": name}, **update})
    return compute(1, jobs)


@pytest.fixture(scope="session")
def together() -> dict[Any, Any]:
    """What two ranks compute, each with a half of the layer."""
    jobs: dict[Any, tuple[str, dict[str, Any]]] = {}
    for kind in KINDS:
        for split in (False, True):
            common = {"kind": kind, "tensor": 2, "sequence_parallel": split}
            for recipe in RECIPES:
                jobs[kind, split, recipe] = ("linear", {**common, "recipe": recipe, **tensors(torch.float32)})
            odd = tensors(torch.float32, inputs=320, outputs=192)
            jobs[kind, split, "odd"] = ("linear", {**common, "recipe": "blockwise", **odd})
            bias = {"bias": torch.linspace(-1, 1, OUTPUTS), "recipe": "blockwise", **tensors(torch.float32)}
            jobs[kind, split, "bias"] = ("linear", {**common, **bias})
            expert = {"expert": True, "skip_bias_add": True, "recipe": "blockwise", **tensors(torch.float32)}
            jobs[kind, split, "expert"] = ("linear", {**common, **expert})
    return compute(2, jobs)


def seen(matrix: torch.Tensor, block: tuple[int, int], format: str, power_of_two: bool, dtype: torch.dtype) -> torch.Tensor:
    """A matrix as FP8 sees it, from the quantiser's two outputs."""
    values, scale_inv = fp8.quantise(matrix, block, format, power_of_two)
    rows, columns = matrix.shape
    each = scale_inv.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (values.float() * each).to(dtype)


def by_hand(recipe: str, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three products of a layer, each operand quantised along what the product sums over."""
    x, dy = x[:, 0], dy[:, 0]
    format = "e5m2" if recipe == "hybrid" else "e4m3"

    def look(matrix: torch.Tensor, block: tuple[int, int], format: str = "e4m3") -> torch.Tensor:
        if recipe == "tensorwise":
            return seen(matrix, tuple(matrix.shape), format, False, torch.float32)
        return seen(matrix, block, format, True, matrix.dtype)

    # In the layer's own layouts: with AMX the order of a bfloat16 product's sums depends on them.
    along_tokens = look(dy.T.contiguous(), (1, 128), format).T.contiguous().T, look(x.T.contiguous(), (1, 128)).T.contiguous()
    return {
        "y": (look(x, (1, 128)) @ look(weight, (128, 128)).T).to(x.dtype),
        "dx": (look(dy, (1, 128), format) @ look(weight, (128, 128))).to(x.dtype),
        "dw": (along_tokens[0] @ along_tokens[1]).to(x.dtype),
    }


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative, over the whole tensor."""
    result, reference = result.double().view(reference.shape), reference.double()
    return float((result - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_multiplies_what_the_quantiser_gives(alone, kind, recipe, dtype):
    result = alone[kind, recipe, dtype]
    for name, expected in by_hand(recipe, **tensors(dtype)).items():
        assert torch.equal(result[name].view(expected.shape), expected), name
    assert result["y"].dtype == dtype and result["counts"] == (1, 1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_near_bfloat16_and_is_not_bfloat16(alone, kind, recipe):
    """E4M3 keeps 4 significant bits, E5M2 3: errors of 2.6 and 5.3 % of an operand, root mean square, over all mantissas."""
    result, plain = alone[kind, recipe, torch.bfloat16], alone[kind, None, torch.bfloat16]
    bounds = {"y": 0.06, "dx": 0.085 if recipe == "hybrid" else 0.06, "dw": 0.085 if recipe == "hybrid" else 0.06}
    for name, bound in bounds.items():
        assert 0.01 < error(result[name], plain[name]) < bound, name
    assert plain["counts"] == (1, 0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_see_the_same_numbers(alone, together, kind, split, recipe):
    """Halves of whole blocks. In float32, where another FP8 number would show a thousand times above the rounding of sums.
    Tensor-wise each half has a factor of its own, so there the bound is FP8's."""
    result, reference = together[kind, split, recipe], alone[kind, recipe, torch.float32]
    for name in ("y", "dx", "dw"):
        assert error(result[name], reference[name]) < (0.06 if recipe == "tensorwise" else 2e-6), name
    assert result["counts"] == (1, 1)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_odd_shards_are_near(together, kind, split):
    reference = by_hand("blockwise", **tensors(torch.float32, inputs=320, outputs=192))
    for name, expected in reference.items():
        assert error(together[kind, split, "odd"][name], expected) < 0.06, name


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_experts_layer_communicates_nothing_itself(alone, together, kind, split):
    """What its ranks have are parts of a sum (the token dispatcher adds them up; here the test does)."""
    result, reference = together[kind, split, "expert"], alone[kind, "blockwise", torch.float32]
    for name in ("y", "dx", "dw"):
        assert error(result[name], reference[name]) < 2e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_added_or_handed_on(alone, together, kind):
    bias, dy = torch.linspace(-1, 1, OUTPUTS), tensors(torch.float32)["dy"]
    plain, biased, skipped = alone[kind, "blockwise", torch.bfloat16], alone[kind, "bias"], alone[kind, "skip"]
    assert torch.equal(biased["y"], plain["y"] + bias.bfloat16()) and not biased["output_bias"]
    assert torch.equal(skipped["y"], plain["y"]) and skipped["output_bias"]
    for split in (False, True):
        result = together[kind, split, "bias"]
        assert error(result["y"], alone[kind, "blockwise", torch.float32]["y"] + bias) < 2e-6
        if kind == "column" or not split:  # a row layer's bias sees a rank's own tokens; Megatron sums those gradients later
            assert error(result["dbias"], dy.sum((0, 1))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_is_no_crash_and_no_gradient(alone, kind):
    for recipe in ("blockwise", "tensorwise"):
        result = alone[kind, "empty", recipe]
        assert result["y"].shape == (0, 1, OUTPUTS) and result["dx"].shape == (0, 1, INPUTS)
        assert not result["dw"].any() and result["dw"].shape == (OUTPUTS, INPUTS)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_megatron_is_told_only_where_transformer_engine_is(alone):
    said = alone["settings", "blockwise"]
    assert said["emulated"] == {}
    assert said["real"] == {
        "fp8": "hybrid", "fp8_recipe": "blockwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
    }  # fmt: skip
    assert alone["settings", "delayed"]["real"]["fp8_amax_compute_algo"] == "max"
    assert alone["settings", "bf16"]["real"] == {} and alone["settings", "bf16"]["optimizer"] == {"fp8_recipe": None}
    assert all(alone["settings", name]["optimizer"] == {"fp8_recipe": name} for name in ("blockwise", "tensorwise", "delayed"))
    assert said["dtype"] is torch.bfloat16


def test_megatron_knows_these_settings(alone):
    assert alone["Megatron", "blockwise"] == "" and alone["Megatron", "delayed"] == ""
    assert "fp8_recipes" in alone["Megatron", "typo"]


def test_rows_are_padded_for_real_fp8_only(alone):
    assert alone["settings", "bf16"]["tokens"] == (1, 1)
    assert alone["settings", "blockwise"]["tokens"] == (1, 16)
    assert alone["settings", "TP"]["tokens"] == (1, 128 * 2 * 2)
    assert alone["settings", "TP without SP"]["tokens"] == (1, 16 * 2)


def test_a_recipe_that_is_not_emulated_is_refused(alone):
    assert "policy.fp8.recipe=delayed" in alone["settings", "delayed"]["problem"]
    assert "blockwise or tensorwise" in alone["settings", "delayed"]["problem"].replace("policy.fp8.recipe=", "")
    assert alone["settings", "blockwise"]["problem"] == alone["settings", "bf16"]["problem"] == ""


def test_sizes_that_fp8_products_do_not_take_are_named(alone):
    """Of a model 24 wide, 48 in its heads, 96 with keys and values, and 40 inside; TP=2 makes 24 of the 48."""
    assert "hidden_size of 24" in alone["settings", "blockwise"]["sizes"][0]
    assert "intermediate_size of 40" in alone["settings", "blockwise"]["sizes"][1]
    assert "heads of 24" in " ".join(alone["settings", "TP"]["sizes"])


def test_a_recipe_that_did_not_reach_megatron_is_noticed(alone):
    model, optimizer = alone["forgotten"]
    assert "TransformerConfig.fp8_recipe is delayed" in model and "OptimizerConfig.fp8_recipe is None" in optimizer


def test_what_a_machine_lacks_for_a_recipe():
    assert fp8_obstacles("blockwise", "2.9.0+cu13", (9, 0), "13.0") == []
    assert fp8_obstacles("tensorwise", "2.2.0", (8, 9), "12.4") == []
    missing = "\n".join(fp8_obstacles("blockwise", "2.2.0", (8, 9), "12.8"))
    for said in ("2.3 or newer, found 2.2.0", "9.0 or newer, found 8.9", "12.9 or newer, found 12.8"):
        assert said in missing
    assert "policy.fp8.recipe=tensorwise or policy.precision=bf16" in missing
    [absent] = fp8_obstacles("tensorwise", None, (9, 0), "12.9")
    assert "not installed" in absent and "install.sh" in absent
    [old] = fp8_obstacles("tensorwise", "2.10.0.dev0", (8, 0), "12.9")
    assert old.endswith("give policy.precision=bf16")
    assert "found none" in fp8_obstacles("delayed", "2.9", None, None)[0]


# -- what ran ---------------------------------------------------------------------------------------------------------

LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def test_fp8_runs_in_the_linears_of_the_layers_and_the_audit_counts_it(updates):
    after = {row.name: row for row in updates["policy", "fp8"]["after"]}
    assert all(row.forwards in (0, None) for row in updates["policy", "fp8"]["before"])
    for layer in range(4):
        for name in LINEARS:
            row = after[f"decoder.layers.{layer}.{name}"]
            assert (row.precision, row.detail) == ("fp8", "blockwise e4m3")
            assert row.forwards == row.fp8_forwards > 0 and row.as_set
        assert after[f"decoder.layers.{layer}.self_attention.core_attention"].precision == "bf16"
    assert after["embedding.word_embeddings"].detail == "outside the layers"
    assert {row.detail for row in updates["policy", "bf16"]["after"]} == {"policy.precision=bf16"}
    assert all(row.precision == "bf16" and row.fp8_forwards == 0 for row in updates["policy", "bf16"]["after"])


def test_first_and_last_layers_stay_in_bfloat16(updates):
    for row in updates["policy", "kept"]["after"]:
        if row.name.endswith(LINEARS):
            inner = ".layers.1." in row.name or ".layers.2." in row.name
            assert row.precision == ("fp8" if inner else "bf16") and row.forwards > 0
            assert row.fp8_forwards == (row.forwards if inner else 0)
            assert inner or row.detail == f"policy.fp8.{'first' if '.0.' in row.name else 'last'}_layers_bf16=1"


def test_recomputed_layers_run_again_in_fp8(updates):
    kept, recomputed = updates["policy", "fp8"], updates["policy", "recompute"]
    once, twice = (next(row for row in result["after"] if "linear_fc1" in row.name) for result in (kept, recomputed))
    assert twice.fp8_forwards == 2 * once.fp8_forwards > 0
    for name in ("policy/loss", "policy/grad_norm"):
        assert recomputed["metrics"][name] == pytest.approx(kept["metrics"][name], rel=1e-6)


@pytest.mark.parametrize("name", ["fp8", "kept", "hybrid", "tensorwise"])
def test_an_update_in_fp8_is_near_one_in_bfloat16(updates, name):
    metrics, plain = updates["policy", name]["metrics"], updates["policy", "bf16"]["metrics"]
    assert metrics["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=0.06)
    assert metrics["policy/grad_norm"] != plain["policy/grad_norm"]
    assert metrics["policy/entropy"] == pytest.approx(plain["policy/entropy"], rel=0.02)


def test_experts_run_in_fp8_and_their_router_does_not(updates):
    after = {row.name: row for row in updates["mixture", "fp8"]["after"]}
    experts = [row for name, row in after.items() if "local_experts" in name]
    assert len(experts) == 4 * 8 * 2 and all(row.fp8_forwards == row.forwards > 0 for row in experts)
    assert after["decoder.layers.2.mlp.router"].precision in ("bf16", "fp32")
    assert "no FP8 form" in after["decoder.layers.2.mlp.router"].detail
    plain = updates["mixture", "bf16"]["metrics"]
    assert updates["mixture", "fp8"]["metrics"]["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=0.1)


def test_transformer_engines_own_state_is_what_counts(alone):
    [row] = alone["engine"]
    assert (row.name, row.precision, row.forwards, row.fp8_forwards) == ("layers.7.linear", "fp8", 3, 1)
    assert not row.as_set and "NOT AS SET" in row.counted


def test_the_table_folds_what_is_alike():
    row = functools.partial(LayerPrecision, precision="fp8", detail="blockwise e4m3", forwards=3, fp8_forwards=3)
    name = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1"
    layers = [row(name.format(layer, expert)) for layer in (0, 1, 2, 5) for expert in (0, 1)]
    layers += [LayerPrecision("output_layer", "bf16", "outside the layers", None, 0)]
    folded, output = audit_lines(layers)
    assert folded.split() == [name.format("0-2,5", "*"), *"fp8 blockwise e4m3 3 of 3 forwards in FP8".split()]
    assert output.split() == "output_layer bf16 outside the layers".split()
    assert len(audit_lines([*layers, row(name.format(9, 0), fp8_forwards=2)])) == 3
    assert audit_lines([]) == []

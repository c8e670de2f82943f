"""The budget against what is really allocated, and what it says of recipes that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS
from ranks import run_ranks
from small_models import DENSE, MIXTURE, make_model

from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config
from megatron_spice.policy import memory_budget, memory_verdict
from megatron_spice.policy.activations import activations
from megatron_spice.policy.memory_budget import GIB, STATES, Budget, Device
from megatron_spice.policy.parameter_count import engine_parameters, rank_parameters

ON_RANKS = Path(__file__).with_name("budget_on_ranks.py")
ROW = 512
SIZES = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 1024}
FULL = {"recompute": "full"}
SOME = {"recompute": "selective", "recompute_modules": ["mlp"]}
# (ranks, layout, family, precision, recomputation)
CASES: list[tuple[int, str, str, str, dict[str, Any]]] = [
    (1, "one", "llama", "fp32", {}),
    (1, "one", "llama", "bf16", FULL),
    (1, "one", "qwen3", "bf16", SOME),
    (1, "one", "qwen3_moe", "bf16", {}),
    (2, "tp2+sp", "llama", "bf16", {}),
    (2, "pp2", "llama", "bf16", {}),
    (2, "pp2 vp2", "qwen3", "bf16", {}),
    (2, "cp2", "qwen3", "bf16", {}),
    (2, "dp2", "qwen3", "fp32", {}),
    (2, "ep2", "qwen3_moe", "bf16", {}),
]
NAMES = [f"{layout}-{family}-{precision}-{again.get('recompute', '')}" for _, layout, family, precision, again in CASES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: make_model(folder / family, family, tied=family == "llama", **SIZES)
        for family in ("llama", "qwen3", "qwen3_moe")
    }


@pytest.fixture(scope="module")
def results(models: dict[str, Path]) -> dict[int, list[dict[str, Any]]]:
    """By number of the case: what each rank measured."""
    found = {}
    for ranks in (1, 2):
        numbers = [number for number, case in enumerate(CASES) if case[0] == ranks]
        jobs = [_job(models, CASES[number]) for number in numbers]
        found |= dict(zip(numbers, zip(*run_ranks(ranks, ON_RANKS, "measured", jobs))))
    return found


def _job(models: dict[str, Path], case: tuple[int, str, str, str, dict[str, Any]]) -> dict[str, Any]:
    _, layout, family, precision, again = case
    return {"model": models[family], "precision": precision, "tokens_per_microbatch": ROW, **again, **LAYOUTS[layout][1]}


def recipe(model: Path = Path("/nowhere"), **rooms: dict[str, Any]) -> Config:
    rooms["policy"] = {"model": model} | rooms.get("policy", {})
    return Config.model_validate({"run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"}, **rooms})


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_weights_gradients_and_optimiser_state_are_as_computed(models, results, number):
    ranks, _, family, precision, _ = CASES[number]
    architecture, config = read_architecture(models[family]), recipe(policy=_job(models, CASES[number]))
    layout = ParallelLayout.of(config.policy, architecture, ranks)
    for rank in results[number]:
        held = rank_parameters(architecture, layout, rank["stage"])
        assert rank["weights"] == held.held * (4 if precision == "fp32" else 2)
        assert rank["gradients"] == held.held * 4
        assert rank["state"] == pytest.approx(held.stepped * (8 if precision == "fp32" else 12), rel=0.002)
        # Less where several ranks have the same: norms on tensor-parallel ones, a tied embedding on the last stage.
        assert rank["snapshot"] <= 1.005 * held.stepped * (12 if precision == "fp32" else 14)


def test_a_rank_that_shares_nothing_saves_all_it_steps(results):
    alone = [rank for number, (_, layout, family, _, _) in enumerate(CASES) if layout == "one" for rank in results[number]]
    assert alone and all(rank["snapshot"] == pytest.approx(rank["weights"] + rank["state"], rel=0.005) for rank in alone)


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_activations_are_about_as_estimated(models, results, number):
    """Of a row: what is saved for backward within a tenth (where experts are shared out a fifth: by chance one rank's get more
    tokens), the peak of an update within a sixth."""
    ranks, name, family, _, again = CASES[number]
    architecture, config = read_architecture(models[family]), recipe(policy=_job(models, CASES[number]))
    layout = ParallelLayout.of(config.policy, architecture, ranks)
    for rank in results[number]:
        estimate = activations(architecture, config.policy, layout, rank["stage"], ROW, on_cuda=False)
        if rank["saved"] and not again:  # what is recomputed saves again
            assert estimate.saved == pytest.approx(rank["saved"], rel=0.2 if layout.expert > 1 else 0.1)
        if name in ("one", "pp2", "pp2 vp2", "dp2"):
            assert estimate.peak == pytest.approx(rank["peak"], rel=1 / 6)


EIGHT_BILLION = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
H100 = Device("cuda", 81559 * 2**20, "an H100")


def of_8b(world_size: int = 8, device: Device = H100, **rooms: dict[str, Any]) -> tuple[Budget, Config]:
    rooms["policy"] = {"tensor_parallel_size": 2, "recompute": "full"} | rooms.get("policy", {})
    rooms["rollout"] = {"engines_per_node": 8, "context_length": 12288} | rooms.get("rollout", {})
    config, architecture = recipe(**rooms), ModelArchitecture.from_config(EIGHT_BILLION)
    layout = ParallelLayout.of(config.policy, architecture, world_size)
    return memory_budget.budget(config, architecture, layout, device), config


@pytest.mark.parametrize("architecture", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_an_engine_of_one_rank_holds_the_model(architecture):
    """What the name table lists; the vocabulary is padded to 64 rows."""
    import math

    from megatron_spice.weights.names import hf_shapes, table

    listed = sum(math.prod(shape) for entry in table(architecture) for shape in hf_shapes(entry, architecture).values())
    padding = (-architecture.vocab_size % 64) * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)
    assert engine_parameters(architecture, 1) == listed + padding
    assert engine_parameters(architecture, 2) < 0.6 * engine_parameters(architecture, 1)


def test_a_recipe_that_fits_has_no_problems_and_states_follow_the_hand_overs():
    made, config = of_8b()
    assert not memory_verdict.problems(made, config) and not memory_verdict.warnings(made, config)
    asleep = ("gradients", "optimiser state", "activations")
    assert all(made.of(name).training and not made.of(name).syncing and not made.of(name).rollout for name in asleep)
    assert made.of("weights").training == made.of("weights").syncing > 0 == made.of("weights").rollout
    assert made.of("engine's weights").training == 0 < made.of("engine's weights").syncing
    assert made.of("engine's KV cache").syncing == 0 < made.of("engine's KV cache").rollout
    # 8.19 billion numbers of 2 bytes; half on each of two ranks, with float32 gradients
    assert made.of("engine's weights").rollout / 2 == pytest.approx(8.19e9, rel=0.001)
    assert made.of("weights").training == pytest.approx(8.19e9, rel=0.001)
    assert made.of("gradients").training == 2 * made.of("weights").training
    assert made.of("optimiser state").training == pytest.approx(8.19e9 / 2 / 4 * 12, rel=0.001)


def test_offloaded_optimisers_and_sleepers_are_in_host_memory():
    made, _ = of_8b(policy={"optimizer_offload": 0.5, "kl_coefficient": 0.0})
    whole, _ = of_8b()
    assert made.of("optimiser state").training == pytest.approx(whole.of("optimiser state").training / 2, rel=0.001)
    assert made.host["offloaded optimiser"] == pytest.approx(8 * whole.of("optimiser state").training / 2 * 16 / 12, rel=0.001)
    assert made.host["reference weights"] == 8 * made.of("weights").training
    small = Device("cuda", H100.num_bytes, "an H100", host_bytes=64 * GIB)
    made, config = of_8b(device=small, policy={"optimizer_offload": 0.5})
    [problem] = memory_verdict.problems(made, config)
    assert "host memory" in problem and "policy.optimizer_offload" in problem


@pytest.mark.parametrize("rooms, state, keys", [
    ({"policy": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}, "rollout": {"engines_per_node": 1}},
     "training", ["policy.tensor_parallel_size=1", "policy.optimizer_offload"]),
    ({"policy": {"recompute": "none", "tokens_per_microbatch": 65536}}, "training",
     ["policy.tokens_per_microbatch=65536", "policy.recompute=full"]),
    ({"rollout": {"memory_fraction": 0.99}}, "rollout", ["rollout.memory_fraction=0.99 to 0.97"]),
    ({"rollout": {"memory_fraction": 0.1}}, "", ["rollout.memory_fraction=0.1 ", "rollout.tensor_parallel_size=1"]),
    ({"rollout": {"memory_fraction": 0.205}}, "", ["a completion may have 4096", "rollout.memory_fraction"]),
    ({"policy": {"sleep": "gradients", "tensor_parallel_size": 1}, "rollout": {"bucket_mb": 12288}}, "syncing",
     ["rollout.bucket_mb=12288"]),
])  # fmt: skip
def test_what_cannot_fit_is_refused_with_numbers_and_keys(rooms, state, keys):
    world_size = 1 if "pipeline_parallel_size" in rooms.get("policy", {}) else 8
    if world_size == 1:
        rooms["cluster"] = {"ranks_per_node": 1}
    made, config = of_8b(world_size, **rooms)
    found = memory_verdict.problems(made, config)
    assert any(problem.startswith(state) and all(key in problem for key in keys) for problem in found), found


def test_engines_with_fp8_weights_take_half_and_leave_more_for_their_cache():
    fp8 = {"precision": "fp8"}
    wide, narrow = of_8b(policy=fp8)[0], of_8b(policy=fp8, rollout={"weights": "fp8"})[0]
    embeddings = 2 * 2 * 151936 * 4096  # of two bytes in both
    layers = wide.of("engine's weights").rollout - embeddings
    assert narrow.of("engine's weights").rollout == pytest.approx(embeddings + layers / 2, rel=0.001)
    assert narrow.cache_tokens > 1.2 * wide.cache_tokens
    config, architecture = recipe(policy=fp8, rollout={"weights": "fp8"}), ModelArchitecture.from_config(EIGHT_BILLION)
    on_a_cpu = memory_budget.engine_weights(config, architecture, on_cuda=False)
    assert on_a_cpu == pytest.approx(wide.of("engine's weights").rollout + layers / 2, rel=0.001)
    kept = of_8b(policy={**fp8, "fp8": {"first_layers_bf16": 18}})[0]
    copies = "FP8 copies of weights"
    assert kept.of(copies).training == pytest.approx(wide.of(copies).training / 2)
    assert not kept.of(copies).rollout


def test_engines_that_run_elsewhere_take_nothing_here():
    made, config = of_8b(rollout={"engines": ["http://far:1"], "engines_per_node": 1})
    assert made.cache_tokens is None and not [part for part in made.parts if part.name.startswith("engine")]
    assert not memory_verdict.problems(made, config) and "KV cache" not in memory_verdict.table(made)
    device = Device("cpu", 900 * GIB, "this machine's memory")
    made, config = of_8b(device=device, rollout={"engines": ["http://far:1"], "engines_per_node": 1})
    assert made.cache_tokens is None and not made.of("engines' weights").training
    assert not memory_verdict.problems(made, config)


def test_what_is_only_estimated_not_to_fit_is_a_warning():
    made, config = of_8b(policy={"recompute": "none", "tokens_per_microbatch": 9500}, rollout={"context_length": 8192})
    size = made.total("training", 0.9)
    tight, config = of_8b(
        device=Device("cuda", size, "a device"), policy={"recompute": "none", "tokens_per_microbatch": 9500},
        rollout={"context_length": 8192},
    )  # fmt: skip
    assert not [problem for problem in memory_verdict.problems(tight, config) if problem.startswith("training")]
    assert any("training is estimated" in words for words in memory_verdict.warnings(tight, config))


def test_on_a_cpu_a_node_holds_all_ranks_and_engines_that_release_nothing():
    config = recipe(
        policy={"pipeline_parallel_size": 2, "precision": "fp32"}, rollout={"engines_per_node": 2, "bucket_mb": 1},
        cluster={"ranks_per_node": 2}, game={"challenger_max_tokens": 8, "reasoner_max_tokens": 8},
    )  # fmt: skip
    layout = ParallelLayout.of(config.policy, DENSE, 2)
    node = Device("cpu", 8 * GIB, "this machine's memory", shared_memory=1000)
    made = memory_budget.budget(config, DENSE, layout, node)
    both = [rank_parameters(DENSE, layout, stage).held for stage in range(2)]
    assert made.of("weights").training == 4 * sum(both) and made.of("gradients").syncing == 0
    assert made.of("engines' weights").training == made.of("engines' weights").rollout == 2 * 4 * engine_parameters(DENSE, 1)
    assert made.cache_tokens == config.rollout.max_total_tokens
    [problem] = memory_verdict.problems(made, config)
    assert "/dev/shm" in problem and "rollout.bucket_mb=1" in problem
    text = memory_verdict.table(made)
    assert all(part.name in text for part in made.parts if any(getattr(part, state) for state in STATES))

"""What the cost model makes of the recipes: it agrees with the memory table and with the counts of parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from published_shapes import add_corpus, add_model

from megatron_spice import plan
from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config
from megatron_spice.cost.device import default_file, read_device
from megatron_spice.cost.engines import engine_shape, longest_silence, silence_warnings
from megatron_spice.cost.estimate import estimate, save_work, warning_seconds
from megatron_spice.cost.play import Batch, EngineShape, batch_work
from megatron_spice.policy import memory_budget
from megatron_spice.policy.memory_budget import H100_BYTES
from megatron_spice.policy.parameter_count import engine_parameters, rank_parameters

RECIPES = {path.stem: path for path in sorted((Path(__file__).resolve().parents[2] / "examples").glob("*g-*.yaml"))}
EIGHT, MIXTURE = "qwen3-8b-1n8g-tp2pp1-bf16", "qwen3-30b-a3b-4n8g-tp2ep8-bf16"
H100 = read_device(default_file("cuda"))


def recipe(folder: Path, name: str, *overrides: str) -> tuple[Config, ModelArchitecture, ParallelLayout, int]:
    model, nodes = re.match(r"(.+?)-(\d+)n\d", name).groups()
    paths = [f"policy.model={add_model(folder / 'model', model)}", f"corpus.path={add_corpus(folder / 'corpus', model)}"]
    config = load_config(RECIPES[name], [*paths, *overrides])
    architecture = read_architecture(config.policy.model)
    return config, architecture, ParallelLayout.of(config.policy, architecture, int(nodes) * 8), int(nodes)


def phases(folder: Path, name: str, *overrides: str, memory: int = H100_BYTES) -> dict[str, float]:
    config, architecture, _, nodes = recipe(folder, name, *overrides)
    return estimate(config, architecture, nodes, H100, memory=memory).phases


def host(folder: Path, name: str, part: str) -> float:
    """Bytes of a rank in the memory table's line on host memory."""
    config, architecture, layout, _ = recipe(folder, name)
    made = memory_budget.budget(config, architecture, layout, memory_budget.Device("cuda", H100_BYTES, "an H100"))
    return made.host[part] / 8


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_save_and_a_hand_over_move_what_the_memory_table_says(name, tmp_path):
    """The busiest rank's, which with several stages is more than a rank's on the average."""
    config, architecture, layout, _ = recipe(tmp_path, name)
    found = phases(tmp_path, name)
    saved = max(rank_parameters(architecture, layout, stage).stepped for stage in range(layout.pipeline)) * 14
    assert found["save"] * config.checkpoint.every == pytest.approx(H100.seconds(save_work(saved)))
    kept = host(tmp_path, name, "a checkpoint being written")
    assert kept <= saved < (1.001 if layout.pipeline == 1 else 1.5) * kept
    moved = H100.seconds({"save_copy": host(tmp_path, name, "copies of what sleeps")})
    uncovered = found["wake"] - H100.seconds({"hand_over": 1.0})
    assert moved * 0.999 <= uncovered < (1.001 if layout.pipeline == 1 else 1.5) * moved
    sent_and_checked = H100.seconds({"copy": 2.0 * engine_parameters(architecture, 1), "push": 1.0, "check": 1.0})
    assert found["sync"] == pytest.approx(found["wake"] + sent_and_checked), "there and back"


def test_a_mixture_s_ranks_save_their_part_of_the_experts(tmp_path):
    config, architecture, layout, nodes = recipe(tmp_path, MIXTURE)
    assert rank_parameters(architecture, layout, 0).stepped * 14 == pytest.approx(13.36e9, rel=0.001)
    found = json.loads(default_file("cuda").read_text())
    found["constants"]["save_write"]["value"] = 1e8
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(found))
    assert warning_seconds(config, architecture, nodes, read_device(slow)) > 2 * 133.6


def test_context_parallel_ranks_share_a_save_too(tmp_path):
    whole, shared = (phases(tmp_path, EIGHT, f"policy.context_parallel_size={size}")["save"] for size in (1, 2))
    assert whole == pytest.approx(shared)


def test_sleepers_that_keep_their_state_move_nothing(tmp_path):
    assert phases(tmp_path, EIGHT, "policy.sleep=gradients", "rollout.memory_fraction=0.8")["wake"] == pytest.approx(H100.seconds({"hand_over": 1.0}))


def test_play_takes_longer_where_the_cache_is_small(tmp_path):
    config, architecture, layout, _ = recipe(tmp_path, EIGHT)
    assert engine_shape(config, architecture, layout, H100, H100_BYTES).kv_tokens == 225_968  # as the memory table says
    large, small = (phases(tmp_path, EIGHT, memory=memory)["play"] for memory in (10 * H100_BYTES, H100_BYTES))
    assert 1.2 * large < small
    assert phases(tmp_path, EIGHT, "rollout.memory_fraction=0.3")["play"] > 1.2 * small


def test_samples_of_a_prompt_have_it_once_in_the_cache():
    shape = EngineShape(kv_tokens=1200.0)
    assert shape.fitting(Batch(1, 800, [100.0] * 8)) == pytest.approx(6) and shape.fitting(Batch(8, 800, [100.0] * 8)) == pytest.approx(4 / 3)


@pytest.mark.parametrize("passages", [128, 1024])
def test_engines_wait_for_half_a_passage_and_not_for_half_of_all(passages, tmp_path):
    """Whether they play them in one round or in several."""
    one, eight = (
        phases(tmp_path, EIGHT, f"train.passages={passages * engines // 8}", "rollout.engines_per_node=1", f"rollout.engines={json.dumps(urls)}")["play"]
        for engines in (1, 8) for urls in [[f"http://far:{number}" for number in range(engines)]]
    )  # fmt: skip
    assert eight / one == pytest.approx(1 + 7 / 8 / 2 / (passages / 8))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_an_engine_that_works_is_not_given_up(name, tmp_path):
    config, architecture, layout, nodes = recipe(tmp_path, name)
    shape = engine_shape(config, architecture, layout, H100, H100_BYTES)
    silence = longest_silence(config, architecture, shape, H100)
    assert 60 < silence < config.rollout.request_timeout / 2 and not silence_warnings(config, architecture, shape, H100)
    text, _ = plan.describe(recipe(tmp_path, name, "rollout.request_timeout=120")[0], nodes)
    [warning] = [line for line in text.splitlines() if "rollout.request_timeout=120" in line and line.startswith("warning")]
    enough = int(re.search(r"give (\d+) or more", warning).group(1))
    assert 2 * silence <= enough < 2 * silence + 60
    assert not silence_warnings(recipe(tmp_path, name, f"rollout.request_timeout={enough}")[0], architecture, shape, H100)


def test_longer_completions_need_more_patience(tmp_path):
    """Of 32,768 tokens an engine takes about eight times as long, and is full with fewer."""
    config, architecture, layout, _ = recipe(tmp_path, EIGHT, "game.reasoner_max_tokens=28000", "rollout.context_length=32768")
    shape = engine_shape(config, architecture, layout, H100, H100_BYTES)
    [warning] = silence_warnings(config, architecture, shape, H100)
    assert "rollout.request_timeout=600" in warning
    lone = batch_work(architecture, shape, Batch(1, 200, [28000.0] * 8))
    assert longest_silence(config, architecture, shape, H100) == pytest.approx(H100.seconds(lone), rel=0.2)



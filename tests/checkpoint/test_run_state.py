"""What a checkpoint says of the run that made it, and what a run that goes on from it takes over and points out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from tiny_recipe import tiny_recipe

from megatron_spice.checkpoint import store
from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.config.loader import load_config

ON_RANKS = Path(__file__).with_name("state_on_ranks.py")
SETTINGS = [
    "cluster.ranks_per_node=1", "policy.pipeline_parallel_size=1", "rollout.verify_sync=false", "rollout.seed=11",
    "telemetry.tensorboard=false", "cluster.timeout=60", "train.passages=2", "checkpoint.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("state"))


def train(recipe: Path, run_dir: Path, *overrides: str, failures: int = 0) -> tuple[str, dict, list[dict]]:
    """What it has printed, the run state of its newest checkpoint, and its metrics."""
    [(printed, code)] = run_ranks(1, ON_RANKS, "run", recipe, [*SETTINGS, f"run.dir={run_dir}", *overrides], failures)
    assert code == 0
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return printed, store.read_state(store.whole_checkpoints(store.folder_of(run_dir))[-1]), metrics


@pytest.fixture(scope="module")
def begun(recipe, tmp_path_factory) -> tuple[Path, str, dict, list[dict]]:
    """A run of one iteration that has lost its engine once, and its folder."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    return run_dir, *train(recipe, run_dir, "train.iterations=1", failures=1)


def test_a_checkpoint_holds_what_made_it(recipe, begun):
    run_dir, printed, first, metrics = begun
    assert "settings that are not those" not in printed
    assert first["config"] == load_config(recipe, [*SETTINGS, f"run.dir={run_dir}", "train.iterations=1"]).model_dump(mode="json")
    assert first["engines"]["restarts"] == 1 == metrics[0]["engines/restarts"]
    assert first["engines"]["seed"] == 11 + 7919 * 5
    ours = [name for name in metrics[0] if name.startswith("memory/")]
    assert len(ours) > 5 and {f"ranks/{name}_max_rank" for name in ours} <= metrics[0].keys(), "known of the first rank alone"
    assert {f"ranks/{name}_min" for name in ("play", "train", "sync/push_seconds", "sync/gib_per_second")} <= metrics[0].keys()


def test_a_run_that_is_over_has_nothing_to_do(recipe, begun):
    run_dir, _, first, metrics = begun
    printed, state, after = train(recipe, run_dir, "train.iterations=1")
    assert printed == f"{run_dir} is at iteration 1 of 1 already: nothing to do\n" and (state, after) == (first, metrics)


def test_a_resumed_run_says_what_is_otherwise_and_goes_on_counting(recipe, begun, tmp_path):
    run_dir, _, first, _ = begun
    shutil.copytree(run_dir, tmp_path / "run")
    run_dir = tmp_path / "run"
    changed = ["train.iterations=2", "game.group_size=4", "rollout.seed=12", "policy.learning_rate=0.5"]
    printed, second, metrics = train(recipe, run_dir, *changed, failures=1)
    told = printed.partition("settings that are not those")[2].partition("resumed from")[0].splitlines()[1:]
    rate = first["config"]["policy"]["learning_rate"]
    assert {line.strip() for line in told} >= {
        "train.iterations: was 1, is 2", "game.group_size: was 2, is 4", "rollout.seed: was 11, is 12",
        f"policy.learning_rate: was {rate}, is 0.5",
    }  # fmt: skip
    assert second["config"]["game"]["group_size"] == 4 and yaml.safe_load((run_dir / "recipe.yaml").read_text()) == second["config"]
    assert [line["engines/restarts"] for line in metrics] == [1, 2] and second["engines"]["restarts"] == 2
    assert second["engines"]["seed"] == 12 + 7919 * 5 + 104729, "it must not draw what the run drew at its start"


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(recipe, begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "run")
    [checkpoint] = store.whole_checkpoints(store.folder_of(tmp_path / "run"))
    state = store.read_state(checkpoint)
    (checkpoint / store.STATE).write_text(json.dumps({key: state[key] for key in ("iteration", "sampler", "baselines", "carried")}))
    printed, second, metrics = train(recipe, tmp_path / "run", "train.iterations=2", "game.group_size=4")
    assert "resumed from" in printed and "settings that are not those" not in printed
    assert [line["engines/restarts"] for line in metrics] == [1, 0] and second["iteration"] == 2


@pytest.mark.parametrize("failures, told", [(0, "while its engines started"), (1, "it is replaced")])
def test_a_run_that_is_to_end_does_not_wait_for_an_engine_that_starts(recipe, tmp_path, failures, told):
    """The time it has for its end is shorter than an engine's start. And it is interrupted then, not failed."""
    overrides = [*SETTINGS, f"run.dir={tmp_path / 'run'}", "train.iterations=1"]
    [(printed, code)] = run_ranks(1, ON_RANKS, "run", recipe, overrides, failures, True)
    assert code == INTERRUPTED and told in printed and "interrupted (SIGTERM)" in printed

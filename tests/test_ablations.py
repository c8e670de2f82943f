"""The recipes of examples/ablations/: each is what it says over the quickstart, is planned, and is run once with real engines.
So are a warm-up, which a run that resumes does not repeat, and a match of the models that come of it.

The runs are of one rank and a tiny model that can say one question; two servers that run already serve them in turn, and the
fixed Challenger starts its own. What makes an ablation one is then looked for in the run's log.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from curriculum_log import write_run
from ranks import run_ranks
from runs_in_turn import SCORED
from small_models import TEXT
from talking_model import talking_model
from tiny_recipe import tool

from megatron_spice import plan
from megatron_spice.config.loader import load_config
from megatron_spice.game.rewards import challenger_reward, majority_share

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "ablations"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
REWARDS = {"r-zero-reward": "r_zero", "absolute-zero-reward": "absolute_zero", "threshold-reward": "threshold"}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model (`hf`) and a corpus of two sources (`corpus`)."""
    folder = tmp_path_factory.mktemp("ablations")
    model = talking_model(folder / "hf")
    for source in ("factbook", "documentation"):
        lines = [json.dumps({"text": f"{source} {number}. {TEXT * 3}", "id": str(number)}) for number in range(12)]
        (folder / f"{source}.jsonl").write_text("\n".join(lines))
    tool(
        "preprocess_corpus", folder / "factbook.jsonl", folder / "documentation.jsonl", "--source", "factbook", "--source",
        "documentation", "--tokenizer", model, "--output", folder / "corpus", "--max-tokens", 40, "--min-tokens", 10,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_quickstart_but_for_what_it_says(name, tiny):
    said = yaml.safe_load(RECIPES[name].read_text())
    assert said.pop("base") == "../quickstart.yaml"
    quickstart = load_config(FOLDER.parent / "quickstart.yaml").model_dump(mode="json")
    found = load_config(RECIPES[name]).model_dump(mode="json")
    for room, values in quickstart.items():
        for key in values:
            told = said.get(room, {}).get(key)
            if isinstance(told, dict):
                assert found[room][key].items() >= told.items()
            else:
                assert found[room][key] == (quickstart[room][key] if told is None else told)
    paths = [f"policy.model={tiny / 'hf'}", f"corpus.path={tiny / 'corpus'}"]
    if name == "strong-challenger":
        given = load_config(RECIPES[name], paths).rollout.challenger.tokenizer
        assert f"tokenizer={given} holds no tokenizer.json" in "".join(plan.describe(load_config(RECIPES[name], paths), 1)[1])
        theirs = shutil.copytree(tiny / "hf", tiny / "theirs")
        (theirs / "chat_template.jinja").write_text("{{ messages[-1].content }}")
        paths.append(f"rollout.challenger.tokenizer={theirs}")
    text, problems = plan.describe(load_config(RECIPES[name], [*paths, f"run.dir={tiny / 'planned'}"]), 1)
    assert not problems and ("2 engine(s)" in text) == (name == "fixed-challenger")
    assert ("tasks are written by" in text) == ("challenger" in name)


@pytest.fixture(scope="module")
def servers(tiny) -> Iterator[tuple[str, str]]:
    """Addresses of the policy's server and of a stronger Challenger's, whose model is the same here."""
    from megatron_spice.cluster.topology import Topology
    from megatron_spice.config.schema import RolloutConfig
    from megatron_spice.rollout import supervisor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor.secrets, "token_urlsafe", lambda size: "a-key")
        patch.setenv("SPICE_ENGINE_KEY", "a-key")
        patch.setenv("SPICE_CHALLENGER_KEY", "a-key")
        config = RolloutConfig(max_total_tokens=4096, max_running_requests=16, context_length=1024, threads=1)
        made = [
            supervisor.SglangEngine(config, Topology(), "fp32", tiny / "hf", tiny / f"server_{number}.log", load_format="auto")
            for number in range(2)
        ]
        try:
            for server in made:
                server.launch()
            for server in made:
                server.wait_ready()
            yield tuple(server.client.url for server in made)
        finally:
            with ThreadPoolExecutor() as closers:
                list(closers.map(lambda server: server.close(), made))


SMALL = {
    "train.iterations": 2, "train.passages": 3, "train.seed": 3, "game.attempts": 4, "game.group_size": 4, "game.attempt_chunk": 4,
    "game.challenger_max_tokens": 16, "game.reasoner_max_tokens": 4, "rollout.context_length": 1024,
    "rollout.max_total_tokens": 4096, "rollout.max_running_requests": 16, "rollout.threads": 1, "policy.precision": "fp32",
    "policy.learning_rate": 0.01, "policy.pipeline_parallel_size": 1, "cluster.ranks_per_node": 1, "checkpoint.every": 9,
    "telemetry.tensorboard": "false", "game.answer_types": "[Integer]",
}  # fmt: skip


class Played(NamedTuple):
    """Episodes by recipe, what `runs` gave back, and the initial model's log-probabilities of `SCORED`."""

    episodes: dict[str, list[dict]]
    found: dict[str, dict]
    initial: list[float]


@pytest.fixture(scope="module")
def played(tiny, servers) -> Played:
    """All recipes, and a warm-up that is run, then gone on with."""
    from megatron_spice.rollout.client import EngineClient

    small = SMALL | {
        "policy.model": tiny / "hf", "corpus.path": tiny / "corpus", "rollout.engines": f"[{servers[0]}]",
    }  # fmt: skip
    write_run(tiny / "taught", "?\nAnswer:8", "How many?", "8", 6)
    tool("export_curriculum", tiny / "taught", tiny / "pairs.parquet", "--valid-only")
    asked = {name: (str(path), small | {"run.dir": tiny / "runs" / name}) for name, path in RECIPES.items()}
    tool("convert_checkpoint", "hf-to-megatron", tiny / "hf", tiny / "megatron")
    asked["fixed-challenger"][1]["policy.model"] = tiny / "megatron"  # whose initial weights have to be written out first
    asked["mcq-only"][1].pop("game.answer_types")
    asked["strong-challenger"][1].update(
        {
            "rollout.challenger.engines": f"[{servers[1]}]", "rollout.challenger.prompt_style": "few_shot",
            "rollout.challenger.tokenizer": "null",  # the server's vocabulary is the policy's
        }
    )  # fmt: skip
    taught = small | {
        "run.dir": tiny / "runs" / "warmup", "warmup.pairs": tiny / "pairs.parquet", "warmup.steps": 3, "warmup.batch": 4,
        "warmup.learning_rate": 1e-3, "policy.learning_rate": 1e-4, "audit.grounded_answers": 2,
    }  # fmt: skip
    quickstart = str(FOLDER.parent / "quickstart.yaml")
    asked["warmup"] = (quickstart, taught | {"train.iterations": 1})
    asked["warmup, resumed"] = (quickstart, taught)
    recipes = {name: (path, [f"{key}={value}" for key, value in settings.items()]) for name, (path, settings) in asked.items()}
    initial = EngineClient(servers[1], "a-key").score(SCORED)
    [found] = run_ranks(1, Path(__file__).parent / "support" / "runs_in_turn.py", "runs", recipes)
    names = [*RECIPES, "warmup"]
    logs = {name: (tiny / "runs" / name / "episodes.jsonl").read_text().splitlines() for name in names}
    return Played({name: [json.loads(line) for line in lines] for name, lines in logs.items()}, found, initial)


def _attempts(episodes: list[dict]) -> list[dict]:
    return [attempt for episode in episodes for attempt in episode["attempts"]]


def test_every_recipe_plays_and_its_rewards_are_its_own(played):
    for name, episodes in played.episodes.items():
        assert [episode["iteration"] for episode in episodes] == [1] * 3 + [2] * 3, name
        kind = REWARDS.get(name, "variance")
        for attempt in _attempts(episodes):
            right = [answer["correct"] for answer in attempt["answers"]]
            rate = sum(right) / len(right) if right else 0.0
            if name == "r-zero-majority-reward" and right:
                kind, rate = "r_zero", majority_share([answer["extracted"] for answer in attempt["answers"]])
            expected = challenger_reward(kind, rate) if attempt["valid"] else -0.1
            assert attempt["reward"] == pytest.approx(expected), name
        if name != "mcq-only":
            assert any(attempt["valid"] for attempt in _attempts(episodes)), f"{name}: nothing was rewarded"


def test_what_makes_each_an_ablation_shows_in_its_log(played):
    logs = played.episodes
    assert {episode["answer_type"] for episode in logs["mcq-only"]} == {"MCQ"}
    assert {episode["passage"]["source"] for episode in logs["corpus-subset"]} == {"factbook"}
    assert {episode["passage"]["source"] for episode in logs["free-form-only"]} == {"factbook", "documentation"}
    assert all(attempt["grounded"] is None for attempt in _attempts(logs["no-corpus"]))
    for name, episodes in logs.items():
        fixed = "challenger" in name
        assert {attempt["weights"] for attempt in _attempts(episodes)} == ({"fixed"} if fixed else {"0", "1"}), name
        answers = [answer for attempt in _attempts(episodes) for answer in attempt["answers"]]
        assert {answer["weights"] for answer in answers} <= {"0", "1"}


def test_a_challenger_that_is_not_trained_keeps_the_initial_weights(played):
    scored = {name: found for name, found in played.found.items() if "policy" in found}
    assert set(scored) == {"fixed-challenger", "strong-challenger"}
    for name, found in scored.items():
        assert found["beside"] == pytest.approx(played.initial, abs=1e-5)
        apart = max(abs(one - other) for one, other in zip(found["policy"], played.initial))
        first = [attempt for attempt in _attempts(played.episodes[name][:3]) if attempt["is_reasoner_task"]]
        learned = any(answer["advantage"] for attempt in first for answer in attempt["answers"])
        assert apart > 5e-5 or not learned, "the policy has not been trained"


def test_a_warm_up_is_learned_from_saved_and_not_repeated(played, tiny):
    run = tiny / "runs" / "warmup"
    assert (played.found["warmup"]["fitted"], played.found["warmup, resumed"]["fitted"]) == (3, 0)
    losses = [json.loads(line)["loss"] for line in (run / "warmup.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (run / "checkpoints" / "iteration_0000001").exists()


def test_the_quickstart_audits_its_tasks_and_answers_them_again_when_asked(played, tiny):
    for line in map(json.loads, (tiny / "runs" / "warmup" / "metrics.jsonl").read_text().splitlines()):
        assert line["audit/tasks"] > 0 and 0 <= line["audit/agreement"] <= 1 and "audit/duplicates" in line
    asked = [attempt for attempt in _attempts(played.episodes["warmup"]) if attempt["is_reasoner_task"]]
    assert asked and all(len(attempt["grounded_answers"]) == 2 for attempt in asked)


def test_checkpoints_and_servers_meet_each_other(played, servers, tiny, capsys):
    """One engine of our own, with what the warm-up's run has learned, and the server that has the initial weights."""
    from tools.crossplay import main

    late = tiny / "runs" / "warmup" / "checkpoints" / "iteration_0000002"
    models = f"early={servers[1]},late={late}"
    settings = {name: value for name, value in SMALL.items() if name.startswith(("game", "rollout", "policy.precision"))}
    paths = {"policy.model": tiny / "hf", "corpus.path": tiny / "corpus"}
    overrides = [f"{key}={value}" for key, value in (settings | paths).items()]
    command = [str(FOLDER.parent / "quickstart.yaml"), str(tiny / "match"), "--challengers", models, "--reasoners", models, "--passages", "5"]
    assert main([*command, *overrides]) == 0
    found = json.loads((tiny / "match" / "matrix.json").read_text())
    tasks = {name: [json.loads(line) for line in (tiny / "match" / f"tasks-{name}.jsonl").read_text().splitlines()] for name in ("early", "late")}
    assert [sorted((line["slot"], line["passage"]) for line in lines) for lines in tasks.values()][0] == sorted(
        (line["slot"], line["passage"]) for line in tasks["late"]
    ), "both wrote from the same passages"
    for pair in found["pairs"]:
        written = [line for line in tasks[pair["challenger"]] if line["task"] is not None]
        lines = map(json.loads, (tiny / "match" / f"answers-{pair['reasoner']}.jsonl").read_text().splitlines())
        rates = [sum(line["correct"]) / 4 for line in lines if line["challenger"] == pair["challenger"]]
        assert pair["tasks"] == len(written) == len(rates) > 0
        assert pair["pass_rate"] == pytest.approx(sum(rates) / len(rates)) and pair["low"] <= pair["pass_rate"] <= pair["high"]
    assert (tiny / "match" / "matrix.png").stat().st_size > 5000 and not (tiny / "match" / "models").exists()
    capsys.readouterr()
    (tiny / "match" / "answers-early.jsonl").write_text("")  # the server's part alone is missing
    assert main([*command, *overrides]) == 0
    said = capsys.readouterr().out
    assert f"early answers {sum(pair['tasks'] for pair in found['pairs']) // 2} tasks" in said and "late answers" not in said
    assert main([*command, *overrides, "game.group_size=3"]) == 2 and "other rules" in capsys.readouterr().err

"""The comparison of whole iterations with TRL's: both sides have the same sequences, and the sums are right."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_game import GHANA, CodePoints, Scripted
from small_models import TEXT, add_tokenizer, make_model

from megatron_spice.config.schema import Config, VerifierConfig
from megatron_spice.game.episodes import episode_record, trajectories
from megatron_spice.game.play import play_passage
from megatron_spice.game.styles import style_for
from megatron_spice.game.verify import Verifier

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import iteration_benchmark  # noqa: E402
import iteration_run  # noqa: E402
import iteration_trl  # noqa: E402

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = add_tokenizer(make_model(tmp_path_factory.mktemp("model") / "hf", "llama", tied=True))
    # The model's context of 256 positions is less than the prompts of byte-sized tokens need.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


def _config(**game) -> Config:
    return Config.model_validate({
        "run": {"dir": "unused"}, "corpus": {"path": "unused"}, "policy": {"model": "unused"},
        "game": {"prompt_style": "few_shot", "answer_types": ["String"], "group_size": 2, "attempts": 4, "attempt_chunk": 2,
                 **game},
    })  # fmt: skip


@pytest.mark.parametrize("fixed_challenger", [False, True])
def test_prompts_and_lengths_come_back_from_the_log(fixed_challenger):
    config, tokenizer = _config(fixed_challenger=fixed_challenger), CodePoints()

    def script(prompt: str, call: int) -> list[str]:
        answers = prompt.endswith("Answer:")
        return [" Accra", " Lagos, perhaps"] if answers else [" What is the capital?\nAnswer: Accra", " nonsense"]

    async def game():
        async with Verifier(VerifierConfig()) as verifier:
            return [
                await play_passage(
                    GHANA, iteration=1, slot=slot, engine=Scripted(script), tokenizer=tokenizer, verifier=verifier,
                    config=config.game, temperature=1.0, top_p=1.0, seed=0,
                )
                for slot in range(2)
            ]  # fmt: skip

    episodes = asyncio.run(game())
    records = [json.loads(json.dumps(episode_record(episode))) for episode in reversed(episodes)]
    groups = iteration_run.trained_groups(records, config, style_for("few_shot", tokenizer), tokenizer)
    assert len(groups) == (2 if fixed_challenger else 4)
    trained = trajectories(episodes, config.game)
    rebuilt = sorted((tuple(prompt), length) for prompt, lengths in groups for length in lengths)
    assert rebuilt == sorted((each.prompt_ids, len(each.completion_ids)) for each in trained)


def test_completions_are_as_long_as_they_are_to_be():
    import torch

    force = iteration_trl._ForcedLengths([1, 3], [7, 5])
    first, second, third = (force(None, torch.zeros(2, 9)) for _ in range(3))
    assert first[0].argmax() == 7 and (first[0] > -1).sum() == 1
    assert first[1, [5, 7]].tolist() == [-float("inf")] * 2 and (second[1] > -1).sum() == 7
    assert third[1].argmax() == 7 and (third[1] > -1).sum() == 1


def _iteration(number: int, seconds: float, tokens: int, other: float) -> dict:
    phases = {"play": seconds - other - 1.0, "train": 1.0, "other": other}
    return {
        "iteration": number, "seconds": seconds, "tokens": tokens, "phases": phases, "sequences": 4, "generated_tokens": 50,
        "trained_completion_tokens": 20,
    }  # fmt: skip


def test_ratios_and_shares():
    rounds = [
        {"ours": [_iteration(2, 10.0, 1000, 0.1)], "theirs": [{"iteration": 2, "tokens": 1000, "seconds": 40.0}]},
        {"ours": [_iteration(2, 10.0, 2000, 0.3)], "theirs": [{"iteration": 2, "tokens": 2000, "seconds": 20.0}]},
    ]
    found = iteration_benchmark.summary(rounds)
    assert found["ratios"] == [4.0, 2.0] and found["ratio"] == 3.0 and found["ratios_of_iterations"] == [4.0, 2.0]
    assert found["outside"] == pytest.approx(0.02) and found["most_outside"] == pytest.approx(0.03)
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    text = iteration_benchmark.table([{"rounds": rounds, "shapes": {"x": 1.0}, "shape": "x", **found}])
    assert "ours / theirs: 3.00" in text and "2.00% (median), 3.00% at most" in text
    alone = [{**each, "theirs": []} for each in rounds]
    assert "  theirs  " not in iteration_benchmark.table([{"rounds": alone, **iteration_benchmark.summary(alone)}])


@pytest.mark.parametrize("arguments, named", [
    (["--model", "nowhere"], "nowhere is no Hugging Face folder"),
    (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    (["--set", "train.itrations=3"], "train.itrations"),
    (["--rounds", "0"], "0 is not a positive number"),
])  # fmt: skip
def test_bad_options_are_named(model, arguments, named):
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "iteration", "--model", model, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr


def test_a_small_run_in_turn_with_trl(model, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed (bash install.sh --test; it needs Python 3.11)")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{number}. {TEXT * 3}", "id": str(number)}) + "\n" for number in range(8)))
    tool, corpus = ROOT / "tools" / "preprocess_corpus.py", tmp_path / "corpus"
    tool = [sys.executable, tool, texts, "--tokenizer", model, "--output", corpus]
    subprocess.run([*map(str, tool), "--max-tokens", "40", "--min-tokens", "10"], check=True, timeout=120, capture_output=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "run": {"dir": str(tmp_path / "unused")}, "corpus": {"path": str(tmp_path / "corpus")}, "train": {"passages": 2},
        "game": {"prompt_style": "few_shot", "answer_types": ["Integer"], "attempts": 4, "group_size": 2,
                 "attempt_chunk": 2, "challenger_max_tokens": 6, "reasoner_max_tokens": 4},
        "rollout": {"max_total_tokens": 4096, "context_length": 1024, "max_running_requests": 8},
        "policy": {"model": str(model), "precision": "bf16"}, "cluster": {"ranks_per_node": 1, "timeout": 120},
    }))  # fmt: skip
    command = [
        sys.executable, ROOT / "tools" / "benchmark.py", "iteration", "--model", model, "--recipe", recipe, "--against", "trl",
        "--rounds", 1, "--iterations", 1, "--their-steps", 1, "--output", tmp_path / "out", "--threads", 1, "--time-limit", 200,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "out" / "iteration.json").read_text())["results"]
    [ours], [theirs] = result["rounds"][0]["ours"], result["rounds"][0]["theirs"]
    assert ours["iteration"] == theirs["iteration"] == 2 and ours["tokens"] == theirs["tokens"] > 0
    # TRL's side raises unless TRL has seen exactly these tokens, prompts and completions.
    assert len(result["shapes"]) == 2 and result["shape"] in result["shapes"]
    assert result["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"], rel=1e-3)

"""The four answers: they claim what the data show, and say so when they show nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from made_run import episode, made_run, write_lines

from megatron_spice.report import answers
from megatron_spice.report.episode_file import scan
from megatron_spice.report.groups import Group, group_runs
from megatron_spice.report.runs import before_folder, read_run


def group_of(*folders: Path) -> Group:
    (group,) = group_runs([read_run(folder) for folder in folders])
    return group


def noisy(begin: float, end: float, count: int, scatter: float = 0.02):
    chance = random.Random(2)
    return lambda number: begin + (end - begin) * number / count + chance.uniform(-scatter, scatter)


@pytest.mark.parametrize(("begin", "end", "verdict"), [
    (0.1, 0.5, "Yes, it earns more"), (0.5, 0.1, "No, it earns less"), (0.3, 0.3, answers.UNKNOWN),
])  # fmt: skip
def test_the_challenger_is_better_when_its_reward_rose_beyond_chance(tmp_path: Path, begin: float, end: float, verdict: str) -> None:
    answer = answers.challenger(group_of(made_run(tmp_path / "run", 30, challenger__reward=noisy(begin, end, 30))))
    assert answer.verdict == verdict
    assert "interval" in answer.headline and "the first 10 iterations against the last 10" in answer.headline


def test_a_reward_that_fell_again_is_said(tmp_path: Path) -> None:
    noise = noisy(0.5, 0.5, 50)
    run = made_run(tmp_path / "run", 50, challenger__reward=lambda number: noise(number) - 0.3 * ((number - 30) / 25) ** 2)
    details = " ".join(answers.challenger(group_of(run)).details)
    assert "It was highest in iterations" in details and "has fallen since" in details


def test_a_short_run_and_a_fixed_challenger_claim_nothing(tmp_path: Path) -> None:
    short = answers.challenger(group_of(made_run(tmp_path / "short", 1, challenger__reward=lambda _: 0.5)))
    assert short.verdict == answers.UNKNOWN and "Only 1 iteration with a value" in short.headline
    fixed = made_run(tmp_path / "fixed", 20, {"game": {"fixed_challenger": True}}, challenger__reward=noisy(0.1, 0.5, 20))
    assert answers.challenger(group_of(fixed)).verdict == "It is not trained"


def test_a_pass_rate_alone_does_not_make_the_reasoner_better(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 30, reasoner__pass_rate=noisy(0.1, 0.6, 30))
    answer = answers.reasoner(group_of(run), None, None)
    assert answer.verdict == "It passes more tasks; whether it reasons better cannot be told"
    assert answer.tone == "open" and "tools/evaluate.py, on fixed questions" in answer.details[-1]


@pytest.mark.parametrize(("scores", "verdict"), [
    ({"a": (0.1, 0.5)}, "Yes"), ({"a": (0.5, 0.1)}, "No, it got worse"), ({"a": (0.1, 0.5), "b": (0.5, 0.1)}, "Better on some, worse on others"),
    ({"a": (0.3, 0.31)}, answers.UNKNOWN),
])  # fmt: skip
def test_fixed_questions_tell_whether_the_reasoner_is_better(tmp_path: Path, scores: dict, verdict: str) -> None:
    run = made_run(tmp_path / "run", 30, reasoner__pass_rate=noisy(0.1, 0.6, 30))
    (run / "evaluation").mkdir()
    for place, iteration in enumerate((0, 30)):
        tasks = {task: {"score": pair[place], "low": pair[place] - 0.05, "high": pair[place] + 0.05} for task, pair in scores.items()}
        (run / "evaluation" / f"{iteration}.json").write_text(json.dumps({"iteration": iteration, "tasks": tasks}))
    answer = answers.reasoner(group_of(run), None, None)
    assert answer.verdict == verdict
    assert "On fixed questions" in answer.headline


def test_a_study_evaluates_before_and_after_over_seeds(tmp_path: Path) -> None:
    def evaluated(folder: Path, score: float) -> None:
        folder.mkdir(parents=True)
        tasks = [{"task": "factbook", "mean": score, "low": score - 0.2, "high": score + 0.2, "items": 30}]
        (folder / "results.json").write_text(json.dumps({"model": f"{folder.parent}/checkpoints/iteration_0000020", "tasks": tasks}))

    evaluated(before_folder(tmp_path, "assets/tiny", "few_shot", 12), 0.1)
    evaluated(before_folder(tmp_path, "assets/tiny", "few_shot", 48), 0.9)  # asked in another way
    recipe = {"policy": {"model": "assets/tiny"}, "game": {"prompt_style": "few_shot", "reasoner_max_tokens": 12}}
    runs = [made_run(tmp_path / f"full-seed{seed}", 20, {"train": {"seed": seed}, **recipe}, reasoner__pass_rate=noisy(0.1, 0.2, 20)) for seed in range(3)]
    for seed, run in enumerate(runs):
        evaluated(run / "evaluation", 0.3 + seed / 100)
    answer = answers.reasoner(group_of(*runs), None, None)
    assert answer.verdict == "Yes" and "mean of 3 seeds: factbook: rose from 10\u00a0% to 31\u00a0%" in answer.headline
    alone = answers.reasoner(group_of(runs[0]), None, None)  # one seed: the questions' own uncertainty is larger
    assert alone.verdict == answers.UNKNOWN


def test_an_answer_that_takes_over_is_a_warning(tmp_path: Path) -> None:
    early = [episode(1, f"Question {number}?", str(number)) for number in range(20)]
    late = [episode(2, f"How many {number}?", "1" if number < 14 else str(number)) for number in range(20)]
    write_lines(tmp_path / "episodes.jsonl", early + late)
    file = scan(tmp_path / "episodes.jsonl", [1], [2])
    group = group_of(made_run(tmp_path / "run", 20, challenger__reward=noisy(0.1, 0.5, 20)))
    assert answers.challenger(group, file.early, file.late).verdict == "It earns more, but one answer has taken over"
    answer = answers.questions(group, file)
    assert answer.verdict == "Mostly \u201chow many \u2026?\u201d"
    assert "is that of 70\u00a0% of the tasks in iteration 2 (5.0\u00a0% in iteration 1): both roles may have agreed" in answer.details[-1]
    assert answers.questions(group, None).verdict == answers.UNKNOWN


def test_where_the_time_goes_adds_up(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 10, seconds__play=lambda _: 6.0, seconds__train=lambda _: 3.0, seconds__other=lambda _: 1.0, seconds__iteration=lambda _: 10.0)
    answer = answers.where_time_goes(group_of(run))
    assert answer.verdict == "Mostly into play: 60\u00a0%"
    assert answer.headline.endswith("play 60\u00a0%, train 30\u00a0%.") and "10\u00a0% of it outside all phases" in answer.details[0]
    assert answers.where_time_goes(group_of(made_run(tmp_path / "none", 10))).verdict == answers.UNKNOWN


def test_waiting_for_the_slowest_rank_is_said(tmp_path: Path) -> None:
    seconds = {"seconds__play": lambda _: 6.0, "seconds__train": lambda _: 4.0, "seconds__iteration": lambda _: 10.0}
    ranks = {"ranks__play_mean": lambda _: 5.0, "ranks__play_max": lambda _: 6.0, "ranks__train_mean": lambda _: 4.0, "ranks__train_max": lambda _: 4.05}
    answer = answers.where_time_goes(group_of(made_run(tmp_path / "run", 10, **seconds, **ranks)))
    assert "The slowest rank needs longer for play than the mean of all ranks: 10\u00a0% of an iteration." in answer.details
    whose = {"ranks__play_max_rank": lambda i: 3.0 if i % 5 else 0.0, "ranks__memory/most_held_gib_mean": lambda _: 1.0, "ranks__memory/most_held_gib_max": lambda _: 99.0}
    told = answers.where_time_goes(group_of(made_run(tmp_path / "newer", 10, **seconds, **ranks, **whose)))
    expected = "The slowest rank, which is rank 3 in 80\u00a0% of the iterations, needs longer for play than the mean of all ranks: 10\u00a0% of an iteration."
    assert expected in told.details


def test_seeds_give_the_interval(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / f"seed{seed}", 20, {"train": {"seed": seed}}, challenger__reward=noisy(0.1, 0.5 + seed / 50, 20)) for seed in range(3)]
    answer = answers.challenger(group_of(*runs))
    assert answer.verdict == "Yes, it earns more" and "mean of 3 seeds" in answer.headline

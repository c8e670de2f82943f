"""What a report makes of folders that are damaged, half written, or of runs that have little in common."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_run import episode, made_run, write_lines

from megatron_spice.evaluation import table
from megatron_spice.evaluation.run import summary
from megatron_spice.evaluation.tasks import find_all
from megatron_spice.report.crossplay import read_matrices
from megatron_spice.report.episode_file import scan
from megatron_spice.report.evaluation import Score, read_scores
from megatron_spice.report.groups import differences, group_runs
from megatron_spice.report.payload import pack_episodes
from megatron_spice.report.runs import read_run
from megatron_spice.report.text import one_line, visible


def test_a_line_being_written_is_left_out_and_said(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", 3, reasoner__pass_rate=lambda number: number / 10)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "reas')
    run = read_run(folder)
    assert run.iterations.tolist() == [1, 2, 3]
    assert any("half written" in notice for notice in run.notices)


def test_iterations_twice_and_missing_are_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"iteration": number, "x": place}) + "\n" for place, number in enumerate([1, 2, 2, 5])))
    run = read_run(tmp_path)
    assert run.series("x").tolist() == [0, 2, 3]
    assert any("stand twice" in notice for notice in run.notices) and any("missing" in notice for notice in run.notices)


@pytest.mark.parametrize(("content", "said"), [
    ("", "no iteration has ended"), ("{broken\n{}\n", "metrics.jsonl:1"), ('{"x": 1}\n', "no whole number 'iteration'"), ("[1]\n", "metrics.jsonl:1"),
    ('{"iteration": 1}\n{"iteration": "2"}\n', "metrics.jsonl:2"),
])  # fmt: skip
def test_metrics_that_are_none_are_refused_by_file_and_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        read_run(tmp_path)


def test_a_recipe_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", 1)
    (folder / "recipe.yaml").write_text("a: [")
    run = read_run(folder)
    assert run.recipe == {} and any("recipe.yaml cannot be read" in notice for notice in run.notices)


def test_runs_that_differ_in_the_seed_are_a_group(tmp_path: Path) -> None:
    def recipe(seed: int, fixed: bool) -> dict:
        return {"run": {"dir": f"runs/{seed}{fixed}"}, "train": {"seed": seed}, "game": {"fixed_challenger": fixed}}

    folders = [made_run(tmp_path / f"{'fixed' if fixed else 'full'}-seed{seed}", 2, recipe(seed, fixed)) for fixed in (False, True) for seed in (0, 1)]
    runs = [read_run(folder) for folder in [*folders, made_run(tmp_path / "old", 2)]]
    groups = group_runs(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("full", 2), ("fixed", 2), ("old", 1)]
    assert differences(runs) == ["train.seed", "game.fixed_challenger"]


def test_groups_of_the_same_name_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / place / "run", 1, {"game": {"no_corpus": place == "b"}}) for place in "ab"]
    assert [group.label for group in group_runs([read_run(folder) for folder in folders])] == ["run: game.no_corpus=false", "run: game.no_corpus=true"]


def test_scores_are_read_from_files_of_several_forms(tmp_path: Path) -> None:
    files = {
        "a.json": {"checkpoint": "runs/x/checkpoints/iteration_0000008", "tasks": {"gsm8k": {"accuracy": 0.5, "interval": [0.4, 0.6], "items": 100}}},
        "iteration_4.json": {"results": [{"task": "math", "score": 31.5, "low": 30, "high": 33}, {"task": "broken", "score": "high"}]},
        "c.json": {"iteration": 0, "scores": {"math": 0.25}},
        "iteration_0/results.json": {"model": "iteration_0000099", "tasks": [{"task": "aime", "mean": 0.125, "low": 0.1, "high": 0.15, "items": 30, "samples": 32}]},
        "d.json": [1, 2],
    }
    (tmp_path / "iteration_0").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "e.json").write_text("{")
    scores, notices = read_scores(tmp_path)
    assert scores == [
        Score("c", 0, "math", 0.25), Score("iteration_0000099", 0, "aime", 0.125, 0.1, 0.15, 30), Score("iteration_4", 4, "math", 31.5, 30.0, 33.0),
        Score("runs/x/checkpoints/iteration_0000008", 8, "gsm8k", 0.5, 0.4, 0.6, 100),
    ]  # fmt: skip
    assert ["d.json" in notices[0], "e.json" in notices[1], len(notices)] == [True, True, 2]
    assert read_scores(tmp_path / "none") == ([], [])


def test_what_the_evaluation_writes_is_read(tmp_path: Path) -> None:
    benchmark = find_all("factbook")[0]
    answered = [{"answers": [{"correct": place < 3, "reason": "exact", "finish": "stop", "extracted": "x", "tokens": 2}]} for place in range(10)]
    (tmp_path / "iteration_8").mkdir()
    table.write(tmp_path / "iteration_8", {"model": "/runs/tiny", "judge": None}, [summary(benchmark, answered, 1.0, tmp_path / "log.jsonl")])
    (score,), notices = read_scores(tmp_path)
    assert (score.iteration, score.task, score.score, score.items, notices) == (8, "factbook", 0.3, 10, [])
    assert 0.1 < score.low < 0.3 < score.high < 0.61


def test_a_cross_play_is_read(tmp_path: Path) -> None:
    pair = {"challenger": "early", "tasks": 5, "low": 0.1, "high": 0.3}
    found = {"pairs": [{**pair, "reasoner": "early", "pass_rate": 0.2}, {**pair, "reasoner": "late", "pass_rate": 0.25}, {**pair, "challenger": "late", "reasoner": "late", "pass_rate": None}]}
    (tmp_path / "crossplay").mkdir()
    (tmp_path / "crossplay" / "matrix.json").write_text(json.dumps(found))
    [matrix] = read_matrices(tmp_path, "run")
    assert matrix.challengers == ["early", "late"]
    assert matrix.rows == [("early", [("0.2", "0.1 to 0.3"), ("-", "")]), ("late", [("0.25", "0.1 to 0.3"), ("-", "")])]
    (tmp_path / "crossplay" / "matrix.json").write_text("[]")
    assert read_matrices(tmp_path, "run") == []
    for name in ("crossplay-100", "crossplay-20", "crossplay-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "matrix.json").write_text(json.dumps(found))
    assert [matrix.run for matrix in read_matrices(tmp_path, "run")] == ["run, up to iteration 20", "run, up to iteration 100"]


def test_questions_are_counted_by_window_and_broken_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write_lines(path, [episode(1), episode(1, "Who was it?", "Ada", grounded=True), episode(2, invalid="unparsable", task=None, answers=()), episode(9, gold="1")])
    with open(path, "a") as file:
        file.write('{"iteration": 9, "attempts": [3]}\n{"iteration": 5, "attempts": 3}\n{"iteration": 10, "att')
    file = scan(path, [1, 2], [9])
    assert (file.early.attempts, file.early.tasks, file.early.grounded, file.broken) == (3, 2, 1, 2)
    assert file.late.golds == {"1": 1} and file.early.openings == {"how many?": 1, "who was": 1}
    # Of an iteration between the windows only the beginning is looked at, until the episode is wanted.
    assert [place[0] for place in file.places] == [1, 1, 2, 9, 5]
    assert [found["iteration"] for found in file.read(file.places[2:])] == [2, 9]
    assert pack_episodes(file, 10**6).episodes == 4
    assert scan(tmp_path / "none", [], []) is None


@given(st.text())
def test_what_is_shown_can_be_seen(text: str) -> None:
    shown = visible(text)
    hidden = {letter for letter in shown if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert hidden <= set("\n\t\u200c\u200d")
    shown.encode("utf-8")  # no half of a pair is left
    assert visible(shown) == shown
    assert len(one_line(text, 20)) <= 20


@pytest.mark.parametrize(("text", "shown"), [
    ("a\x00b\x1b[2J", "a[U+0000]b[U+001B][2J"), ("\u202eevil", "[U+202E]evil"), ("\ud800", "[U+D800]"), ("\ufeffx\u200b", "[U+FEFF]x[U+200B]"),
    ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"), ("caf\u00e9 \U0001f600\n\t", "caf\u00e9 \U0001f600\n\t"),
])  # fmt: skip
def test_characters_that_a_browser_obeys_are_numbers(text: str, shown: str) -> None:
    assert visible(text) == shown

"""The curriculum as a data set: every attempt with where it came from, filters, and a file that is whole or not there."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from megatron_spice.curriculum import export as exporting
from megatron_spice.curriculum.export import Wanted, export
from megatron_spice.curriculum.rows import COLUMNS, Run, rows
from tools.export_curriculum import main

MCQ = "Which?\nA) Volta\nB) Rhine\nC) Nile\nD) Ebro"


def answer(correct: bool, text: str) -> dict:
    return {"text": text, "tokens": 3, "weights": "1", "finish": "stop", "extracted": text, "correct": correct, "why": "exact",
            "reward": float(correct), "advantage": 0.0}  # fmt: skip


def attempt(question: str | None, gold: str = "Volta", kind: str = "String", right: str = "", **more) -> dict:
    task = question and {"question": question, "gold_answer": gold, "answer_type": kind}
    answers = [answer(each == "1", f" {gold if each == '1' else 'no'}") for each in right]
    return {
        "text": f" {question}\nAnswer: {gold}", "tokens": 9, "weights": "3+4", "finish": "stop", "valid": task is not None,
        "invalid": None if task else "unparsable", "grounded": None, "in_group": bool(right), "reward": 0.5, "advantage": 0.0,
        "task": task, "is_reasoner_task": False, "answers": answers, **more,
    }  # fmt: skip


def episode(iteration: int, *attempts: dict) -> dict:
    passage = {"index": 40 + iteration, "document": 7, "source": "factbook", "text": "The Volta flows east to the sea."}
    return {"iteration": iteration, "begun": iteration, "slot": 0, "passage": passage, "prompt_style": "few_shot",
            "answer_type": "String", "seconds": 1.0, "verifier_timeouts": 0, "attempts": list(attempts)}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"policy": {"model": "some/model"}, "game": {"no_corpus": False}}))
    lines = [
        episode(1, attempt("Which river flows?", right="1100", is_reasoner_task=True), attempt(None), attempt("In the text, what?", right="0000")),
        episode(2, attempt(MCQ, "A", "MCQ", right="1111", grounded_answers=[answer(True, "A"), answer(False, "B")]), attempt("which River flows")),
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return folder


def test_a_row_holds_where_an_attempt_came_from_and_what_became_of_it(run, tmp_path):
    target = tmp_path / "out.parquet"
    assert export(Run.open(run), target, Wanted()) == (5, 5)
    table = pq.read_table(target)
    assert table.column_names == list(COLUMNS)
    first, invalid, refers, mcq, again = table.to_pylist()
    assert (first["iteration"], first["passage_index"], first["document"], first["source"]) == (1, 41, 7, "factbook")
    assert first["weights"] == "3+4" and first["model"] == "some/model" and first["run"] == "a-run" and len(first["recipe_hash"]) == 64
    assert first["pass_rate"] == 0.5 and first["verdicts"] == [True, True, False, False] and first["right_answers"] == [" Volta"]
    assert first["is_reasoner_task"] and first["flags"] == [] and first["agreement"] is None and first["duplicate"] is None
    assert invalid["question"] is None and invalid["invalid_reason"] == "unparsable" and invalid["pass_rate"] is None
    assert refers["flags"] == ["refers"] and refers["pass_rate"] == 0.0
    assert mcq["options"] == ["Volta", "Rhine", "Nile", "Ebro"] and mcq["gold_answer"] == "A" and mcq["agreement"] == 0.5
    assert again["duplicate"] == "exact" and again["pass_rate"] is None
    assert {row["reasoner_prompt_style"] for row in table.to_pylist()} == {"few_shot"}, "a log without it: like the Challenger"
    about = json.loads(pq.read_schema(target).metadata[b"curriculum"])
    assert about["recipe_hash"] == first["recipe_hash"]


def test_each_roles_style_stands_in_its_own_column(run, tmp_path):
    line = episode(1, attempt("Which river flows?", right="11")) | {"prompt_style": "chat", "reasoner_prompt_style": "few_shot"}
    (run / "episodes.jsonl").write_text(json.dumps(line) + "\n")
    export(Run.open(run), tmp_path / "out.parquet", Wanted())
    [row] = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["prompt_style"], row["reasoner_prompt_style"]) == ("chat", "few_shot")


@pytest.mark.parametrize(("wanted", "slots"), [
    (Wanted(valid_only=True), [0, 2, 3, 4]),
    (Wanted(reasoner_tasks=True), [0]),
    (Wanted(min_pass=0.1), [0, 3]),
    (Wanted(min_pass=0.1, max_pass=0.9), [0]),
    (Wanted(max_pass=0.0), [2]),
    (Wanted(min_agreement=0.5), [3]),
    (Wanted(valid_only=True, without=("duplicate", "refers")), [0, 3]),
])  # fmt: skip
def test_filters(run, tmp_path, wanted, slots):
    everything = list(rows(Run.open(run)))
    assert export(Run.open(run), tmp_path / "out.parquet", wanted) == (len(slots), 5)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["completion"] for row in found] == [everything[slot]["completion"] for slot in slots]


def test_datasets_reads_it(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "out.parquet"), "--valid-only", "--min-pass", "0.1"]) == 0
    assert "2 of 5 attempts" in capsys.readouterr().out
    script = (
        "import sys, datasets\n"
        "found = datasets.load_dataset('parquet', data_files=sys.argv[1], cache_dir=sys.argv[2])['train']\n"
        "print(found.num_rows, found[0]['question'], found[1]['options'])"
    )
    read = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out.parquet", tmp_path / "cache"], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert read.stdout.strip() == "2 Which river flows? ['Volta', 'Rhine', 'Nile', 'Ebro']", read.stderr[-2000:]


def test_what_fails_on_the_way_leaves_no_file(run, tmp_path):
    lines = (run / "episodes.jsonl").read_text().splitlines()
    (run / "episodes.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n")
    with pytest.raises(ValueError, match="episodes.jsonl:2"):
        export(Run.open(run), tmp_path / "out.parquet", Wanted())
    assert [path.name for path in tmp_path.iterdir()] == ["a-run"]


def test_wrong_arguments_are_named(run, tmp_path, capsys):
    def said(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "recipe.yaml is not there" in said(tmp_path, tmp_path / "out.parquet")
    assert "exists" in said(run, run / "recipe.yaml")
    with pytest.raises(SystemExit):
        main([str(run), "out.parquet", "--min-pass", "1.5"])
    assert "1.5 is not a share" in capsys.readouterr().err
    (run / "episodes.jsonl").unlink()
    assert "telemetry.episodes=false" in said(run, tmp_path / "out.parquet")


def test_memory_does_not_grow_with_the_run(run, tmp_path, monkeypatch):
    one = episode(1, *(attempt(f"Which river number {number} flows?", right="10") for number in range(5)))

    def peak(count: int) -> int:
        monkeypatch.setattr(Run, "episodes", lambda self: itertools.repeat(one, count))
        tracemalloc.start()
        assert export(Run.open(run), tmp_path / f"{count}.parquet", Wanted())[1] == 5 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(exporting, "BATCH", 50)
    peak(20)  # what is imported and cached once
    assert peak(300) < 1.5 * peak(60)

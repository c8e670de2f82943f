"""tools/evaluate.py grade: a verdict a line, whatever the line holds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"


def grade(text: str | bytes, *options: str) -> tuple[int, list[dict], str]:
    data = text.encode() if isinstance(text, str) else text
    command = [sys.executable, TOOL, "grade", "-", *options]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.decode().splitlines()], done.stderr.decode()


def line(gold: str, answer_type: str, response: str, **more: object) -> str:
    return json.dumps({"gold": gold, "answer_type": answer_type, "response": response, **more}) + "\n"


def test_a_verdict_a_line_in_order():
    records = [
        line("42", "Integer", r"so \boxed{42.0}", id="first"),
        line("Paris", "String", r"\boxed{\text{Paris}}"),
        line("B", "MCQ", r"I think \boxed{A}, no, \boxed{B) Rome}", question="Which?\nA) Oslo\nB) Rome"),
        line(r"\frac{1}{2}", "Expression", r"\boxed{0.5}"),
        line("42", "Integer", "forty-two"),
        line("7", "Integer", r"\boxed{" + "9" * 100_000 + "}"),
        line("x + 1", "Expression", "\\boxed{x + \ud83d}"),
    ]
    code, verdicts, summary = grade("".join(records))
    assert code == 0
    assert [verdict["correct"] for verdict in verdicts] == [True, True, True, True, False, False, False]
    assert verdicts[0] == {"id": "first", "correct": True, "extracted": "42.0", "reason": "number"}
    assert verdicts[4]["reason"] == "no_answer" and verdicts[5]["reason"] == "too_long" and verdicts[6]["extracted"] == "x + \ud83d"
    assert "4 of 7 correct (57.1%)" in summary


def test_lines_that_are_no_records_are_named_and_the_rest_is_graded():
    broken = ["{", "[1]", "null", '{"gold": 3, "answer_type": "Integer", "response": "x"}', '{"gold": "3", "answer_type": "Int"}']
    text = "\n".join([*broken, line("3", "Int", "x").strip(), "[" * 100_000, line("3", "Integer", r"\boxed{3}")])
    code, verdicts, summary = grade(text.encode() + b"\xff\n")
    assert code == 1 and len(verdicts) == len(broken) + 4
    errors = [verdict.get("error", "") for verdict in verdicts]
    for place, part in enumerate(["not JSON", "a JSON list", "a JSON NoneType", "gold is a int", "response is missing", "one of MCQ", "not JSON"]):
        assert part in errors[place], errors[place]
    assert verdicts[7] == {"correct": True, "extracted": "3", "reason": "exact"} and "not JSON" in errors[8]
    assert "1 of 1 correct" in summary


def test_a_gold_answer_that_is_none_of_its_type_is_an_error_of_its_line_alone():
    golds = [("42.0", "Integer"), ("42 km", "Integer"), ("", "String"), ("neither", "MCQ"), ("H", "Integer"), (" 42 ", "Integer")]
    code, verdicts, summary = grade("".join(line(gold, kind, r"\boxed{42 m}", id=gold) for gold, kind in golds))
    assert code == 1 and [verdict["id"] for verdict in verdicts] == [gold for gold, _ in golds]
    assert all("gold is" in verdict["error"] for verdict in verdicts[:5]) and verdicts[5]["correct"]
    assert "expected an integer" in verdicts[0]["error"] and "expected a letter" in verdicts[3]["error"]
    assert "1 of 1 correct" in summary and "5 error" in summary


def test_a_gold_letter_may_be_written_as_benchmarks_do():
    question = "Which?\nA) Oslo\nB) Rome\nC) Bern"
    golds = ["(C)", "C)", "c", "C", "**C.**", r"\text{(C)}", "Bern", "C) Bern"]
    code, verdicts, _ = grade("".join(line(gold, "MCQ", r"\boxed{C}", question=question) for gold in golds))
    assert code == 0 and all(verdict["correct"] and verdict["reason"] == "letter" for verdict in verdicts)
    code, verdicts, _ = grade(line("(F)", "MCQ", r"\boxed{F}") + line("(F)", "MCQ", r"\boxed{F}", question=question))
    assert code == 1 and verdicts[0]["correct"] and "expected a letter" in verdicts[1]["error"]


def test_no_file_and_no_line():
    done = subprocess.run([sys.executable, TOOL, "grade", "/nowhere.jsonl"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "/nowhere.jsonl" in done.stderr
    assert grade("")[:2] == (0, [])


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--tasks", "gsm"], "there is no task 'gsm'; there are amc, minerva"),
        (["{model}", "--tasks", "gsm8k"], "gsm8k (GSM8K, test: openai/gsm8k (1,319)) needs its file: --data gsm8k=PATH"),
        (["{model}", "--tasks", "gsm8k", "--data", "gsm8k={file}"], "no field for question (question or problem or input or prompt)"),
        (["{model}", "--tasks", "gsm8k", "--data", "gsm8k=/nowhere.jsonl"], "/nowhere.jsonl is not there"),
        (["{model}", "--tasks", "gsm8k", "--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["{model}", "--tasks", "gsm8k", "--data", "gsm8k={file}", "--map", "question=q", "--map", "answer=a", "--samples", "4"], "give --temperature too"),
        (["{model}", "--tasks", "factbook", "--engine", "thread=1"], "--engine thread=1: expected KEY=VALUE with a setting of `rollout`"),
        (["{model}", "--tasks", "factbook", "--engine", "threads=none"], "--engine threads='none': Input should be a valid integer"),
        (["/nowhere", "--tasks", "factbook"], "/nowhere is neither a folder nor an address"),
        (["{model}", "--tasks", "gsm8k", "--data", "gsm8k={file}", "--map", "question=q", "--map", "answer=a"], "is no checkpoint: it holds neither config.json"),
        (["{model}", "--tasks", "factbook", "--recipe", "/nowhere.yaml"], "/nowhere.yaml"),
        (["hold-out", "{file}", "{file}", "{file}"], "exists; remove it or name another"),
    ],
)  # fmt: skip
def test_wrong_input_is_said_before_anything_starts(tool, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"q": "?", "a": "1"}\n')
    known = {"model": str(tmp_path / "model"), "file": str(tmp_path / "rows.jsonl")}
    assert tool.main([argument.format(**known) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_tasks_are_listed_with_their_fields(tool, capsys):
    assert tool.main(["tasks"]) == 0
    said = capsys.readouterr().out
    assert "mean of 32 at temperature 0.6" in said and "letter: answer_letter | answer | answer_index" in said

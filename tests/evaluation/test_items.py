"""Rows of the public layouts become the questions and gold answers that they mean; what is wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_spice.evaluation import sources
from megatron_spice.evaluation.gold import read_gold, task_of
from megatron_spice.evaluation.items import make_items
from megatron_spice.evaluation.rows import Wanted, read_rows
from megatron_spice.evaluation.tasks import BY_NAME, PAPER, find_all

TEN = [f"metal {number}" for number in range(10)]
# One row of each layout as its publisher has it: (task, row, gold answer, answer type).
PUBLIC = [
    ("amc", {"id": 3, "problem": "How many?", "answer": 142.0, "url": "x"}, "142", "Integer"),
    ("amc", {"id": "3", "question": "How many?", "answer": "27.0"}, "27", "Integer"),
    ("minerva", {"question": "At what frequency?", "answer": "4.5e33"}, "4.5e33", "Expression"),
    ("minerva", {"problem": "Which?", "solution": r"so \boxed{\frac{1}{2}}", "type": "p", "idx": 0}, r"\frac{1}{2}", "Expression"),
    ("math500", {"problem": "Convert.", "solution": "...", "answer": r"\left( 3, \frac{\pi}{2} \right)", "unique_id": "test/1.json"}, r"\left( 3, \frac{\pi}{2} \right)", "Expression"),
    ("math500", {"problem": "Who?", "answer": r"\text{Evelyn}", "unique_id": "test/2.json"}, r"\text{Evelyn}", "String"),
    ("math500", {"problem": "How much?", "answer": r"\$32,\!348", "unique_id": "test/3.json"}, "32348", "Integer"),
    ("math500", {"problem": "How many degrees?", "answer": r"90^\circ", "unique_id": "test/4.json"}, "90", "Integer"),
    ("math500", {"problem": "Which?", "answer": r"\text{(C)}", "unique_id": "test/5.json"}, "C", "MCQ"),
    ("gsm8k", {"question": "How much?", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,800"}, "1,800", "Integer"),
    ("olympiad", {"id": 1606, "question": "Find.", "final_answer": ["$2$", "$3$"], "answer_type": "Numerical"}, "2, 3", "Expression"),
    ("olympiad", {"id": 1606, "question": "Find.", "final_answer": "[\"$\\\\frac{1}{2}$\"]"}, r"\frac{1}{2}", "Expression"),
    ("aime24", {"ID": "2024-I-1", "Problem": "Find.", "Solution": "...", "Answer": 204}, "204", "Integer"),
    ("aime25", {"id": 0, "problem": "Find.", "answer": "070"}, "070", "Integer"),
    ("supergpqa", {"uuid": "u", "question": "Which?", "options": TEN, "answer": "metal 9", "answer_letter": "J"}, "J", "MCQ"),
    ("mmlu_pro", {"question_id": 70, "question": "Which?", "options": TEN[:7], "answer": "G", "answer_index": 6, "cot_content": ""}, "G", "MCQ"),
    ("mmlu_pro", {"question_id": 70, "question": "Which?", "options": TEN[:7], "answer_index": 6}, "G", "MCQ"),
    ("gpqa", {"question": "Which?\nA) x\nB) y\nC) z\nD) w", "answer": "(C)"}, "C", "MCQ"),
    ("bbeh", {"input": "Is it?\nOptions:\n(A) Yes\n(B) No", "target": "(B)"}, "B", "MCQ"),
    ("bbeh", {"task": "bbeh linguini", "input": "Say.", "target": "yes, no, yes", "mini": 0}, "yes, no, yes", "String"),
    ("bbeh", {"input": "Count.", "target": "17"}, "17", "Integer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "gold", "answer_type"), PUBLIC)
def test_public_layouts(name, row, gold, answer_type):
    [item] = make_items(BY_NAME[name], [row], {}, "rows")
    assert (item.task.gold_answer, item.task.answer_type) == (gold, answer_type)
    assert (row.get("question") or row.get("problem") or row.get("Problem") or row.get("input")) in item.task.question


def test_gpqa_options_are_shuffled_the_same_for_all():
    rows = [
        {"Question": f"Which {n}?", "Correct Answer": "right", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"}
        for n in range(40)
    ]  # fmt: skip
    items = make_items(BY_NAME["gpqa"], rows, {}, "rows")
    assert [i.task for i in items] == [i.task for i in make_items(BY_NAME["gpqa"], rows[::-1], {}, "rows")[::-1]]
    assert {item.task.gold_answer for item in items} == set("ABCD")
    assert all(f"{item.task.gold_answer}) right" in item.task.question for item in items)


@pytest.mark.parametrize(
    ("gold", "kind", "answer_type"),
    [
        ("12", "text", "Integer"), ("-3", "text", "Integer"), ("3.5", "text", "Expression"), ("no", "text", "String"), ("xy", "mathematics", "Expression"),
        ("even", "mathematics", "String"), ("x^2", "text", "Expression"), ("(B)", "text", "MCQ"), ("[2, 5)", "mathematics", "Expression"),
        ("Alice and Bob", "mathematics", "String"), (r"10\%", "mathematics", "Integer"), ("a" * 300, "mathematics", "String"),
        ("18.90 dollars", "text", "Expression"),
    ],
)  # fmt: skip
def test_answer_types_by_form(gold, kind, answer_type):
    assert task_of(gold, kind)[1] == answer_type


def test_fields_by_hand_and_missing_ones():
    rows = [{"stem": "How many?", "key": "4"}]
    [item] = make_items(BY_NAME["gsm8k"], rows, {"question": "stem", "answer": "key"}, "rows")
    assert item.task.question == "How many?" and item.id == "1"
    with pytest.raises(ValueError, match=r"no field for question \(question or problem or input or prompt\), answer .*it has 'stem', 'key': .*--map"):
        make_items(BY_NAME["gsm8k"], rows, {}, "file.jsonl")
    with pytest.raises(ValueError, match="file.jsonl has no field 'body'; it has 'stem', 'key'"):
        make_items(BY_NAME["gsm8k"], rows, {"question": "body"}, "file.jsonl")
    with pytest.raises(ValueError, match="there is no such meaning; there are answer, id, question"):
        make_items(BY_NAME["gsm8k"], rows, {"gold": "key"}, "file.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "", "answer": "4"}, "row 1 of f: its question is ''"),
        ("gsm8k", {"question": "?", "answer": None}, "a NoneType, expected"),
        ("gsm8k", {"question": "?", "answer": "#### "}, "an empty answer"),
        ("mmlu_pro", {"question": "?", "options": ["a"], "answer": "A"}, "a list of 2 to 26"),
        ("mmlu_pro", {"question": "?", "options": ["a", "b"], "answer": "C"}, "expected a letter from A to B"),
        ("mmlu_pro", {"question": "?", "options": ["a", "b"], "answer": 2}, "expected a letter from A to B"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_named(name, row, message):
    with pytest.raises(ValueError, match=message):
        make_items(BY_NAME[name], [row], {}, "f")


@pytest.mark.parametrize(("value", "gold"), [(3.0, "3"), (2.5, "2.5"), (["1", "2"], "1, 2"), ("[0,1]", "[0,1]"), ("$x$", "x"), ("$1", "$1")])
def test_gold_answers(value, gold):
    assert read_gold(value) == gold


def test_every_kind_of_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps({"canary": "x", "examples": rows}))
    (tmp_path / "c.csv").write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(5)))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as out, pa.ipc.new_stream(out, pa.Table.from_pylist(rows).schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows))
    for file in sorted(tmp_path.iterdir()):
        assert read_rows(file) == rows, file.name


def test_separators_of_unicode_are_part_of_a_text(tmp_path):
    question = "one\u2028two\u0085three\x0bfour"
    row = {"question": question, "answer": "4"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text(f"question,answer\n{question},4\n", encoding="utf-8")
    assert [found["question"] for found in read_rows(tmp_path / "a.jsonl")] == [question, question]
    assert read_rows(tmp_path / "b.csv") == [row]


def test_folders_and_their_splits(tmp_path):
    def lines(folder: str, name: str, answer: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(json.dumps({"question": "?", "answer": answer}))

    lines("both", "train-00000.jsonl", "1")
    lines("both", "test-00000.jsonl", "2")
    lines("both", "test-00001.jsonl", "3")
    lines("one", "train.jsonl", "4")
    lines("none", "contest.jsonl", "5")
    assert [row["answer"] for row in read_rows(tmp_path / "both")] == ["2", "3"]
    assert [row["answer"] for row in read_rows(tmp_path / "both", "train")] == ["1"]
    assert [row["answer"] for row in read_rows(tmp_path / "one")] == ["4"]
    assert [row["answer"] for row in read_rows(tmp_path / "none")] == ["5"]
    with pytest.raises(ValueError, match="files of the splits test, train, none of 'dev'"):
        read_rows(tmp_path / "both", "dev")
    (tmp_path / "none" / "contest.jsonl").write_text('{"question": "?"}\n{')
    with pytest.raises(ValueError, match="contest.jsonl:2 is not JSON"):
        read_rows(tmp_path / "none")


# Repositories as they are downloaded: the files of each, those that are the benchmark, and those that are refused together.
REPOSITORIES = [
    ("gsm8k", ["main/test-00000-of-00001.jsonl", "main/train-00000-of-00001.jsonl", "socratic/test-00000-of-00001.jsonl"], ["main/test-00000-of-00001.jsonl"]),
    ("gsm8k", ["test.jsonl", "test_socratic.jsonl"], None),
    ("gpqa", ["gpqa_diamond.jsonl", "gpqa_main.jsonl", "gpqa_extended.jsonl", "gpqa_experts.jsonl"], ["gpqa_diamond.jsonl"]),
    ("olympiad", [f"OlympiadBench/{name}/{name}.jsonl" for name in ("OE_MM_maths_en_COMP", "OE_TO_maths_en_COMP", "OE_TO_maths_zh_CEE", "OE_TO_physics_en_COMP")], ["OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.jsonl"]),
    ("bbeh", ["bbeh/benchmark_tasks/bbeh_a/task.json", "bbeh/benchmark_tasks/bbeh_b/task.json", "bbeh/mini/data.json"], ["bbeh/benchmark_tasks/bbeh_a/task.json", "bbeh/benchmark_tasks/bbeh_b/task.json"]),
    ("bbeh", ["bbeh_a/task.json", "bbeh_b/task.json"], ["bbeh_a/task.json", "bbeh_b/task.json"]),
    ("bbeh", ["data.json"], ["data.json"]),
    ("aime25", ["aime2025-I.jsonl", "aime2025-II.jsonl"], ["aime2025-I.jsonl", "aime2025-II.jsonl"]),
    ("amc", ["data/train-00000-of-00001-7b34565378f02992.jsonl"], ["data/train-00000-of-00001-7b34565378f02992.jsonl"]),
    ("math500", ["test.jsonl", "test.json"], None),
    ("mmlu_pro", ["data/test-00000-of-00002.jsonl", "data/test-00001-of-00002.jsonl", "data/validation-00000-of-00001.jsonl"], ["data/test-00000-of-00002.jsonl", "data/test-00001-of-00002.jsonl"]),
    ("minerva", ["2023.jsonl", "2024.jsonl"], None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "there", "read"), REPOSITORIES)
def test_of_a_repository_with_several_tables_one_is_read(tmp_path, name, there, read):
    benchmark = BY_NAME[name]
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps({"question": path, "answer": "1"}))
    wanted = Wanted(benchmark.files, benchmark.parts)
    if read is None:
        with pytest.raises(ValueError, match=r"has 2 tables \(.*, .*\): give the file or the folder of one of them"):
            read_rows(tmp_path, wanted=wanted)
    else:
        assert [row["question"] for row in read_rows(tmp_path, wanted=wanted)] == read


def test_several_tables_are_refused_for_a_benchmark_without_a_known_name(tmp_path):
    for name in ("data.json", "other/data.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([{"input": "?", "target": "1"}]))
    [request] = [sources.request_for(benchmark, [f"bbeh={tmp_path}"], []) for benchmark in find_all("bbeh")]
    with pytest.raises(ValueError, match=r"has 2 tables \(data.json, other/data.json\)"):
        sources.load(request, "test", None)
    (tmp_path / "task.json").write_text(json.dumps([{"input": "this one", "target": "1"}]))
    assert [item.task.question for item in sources.load(request, "test", None)] == ["this one"]


def test_hugging_face_saved_folders(tmp_path):
    import pyarrow as pa

    for split, answer in (("train", "1"), ("test", "2")):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        made = pa.Table.from_pylist([{"question": "?", "answer": answer}])
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as out, pa.ipc.new_stream(out, made.schema) as stream:
            stream.write_table(made)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert [row["answer"] for row in read_rows(tmp_path / "saved")] == ["2"]
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        read_rows(tmp_path / "saved", "dev")


def test_tasks_by_name_in_the_papers_order():
    assert [task.column for task in find_all("paper")] == [
        "AMC", "Minerva", "MATH500", "GSM8K", "Olympiad", "AIME24", "AIME25", "SuperGPQA", "GPQA-D", "MMLU-Pro", "BBEH",
    ]  # fmt: skip
    assert [task.name for task in find_all("bbeh, gsm8k,reasoning-gym/gcd,gsm8k")] == ["gsm8k", "bbeh", "reasoning-gym/gcd"]
    assert {task.name: task.samples for task in PAPER if task.samples > 1} == {"aime24": 32, "aime25": 32}
    with pytest.raises(ValueError, match="no task 'gsm'; there are amc, .*paper"):
        find_all("gsm")


def test_where_rows_are_looked_for(tmp_path):
    [benchmark] = find_all("gsm8k")
    with pytest.raises(ValueError, match="needs its file: --data gsm8k=PATH"):
        sources.request_for(benchmark, [], [])
    with pytest.raises(ValueError, match="--map question: expected"):
        sources.request_for(benchmark, ["gsm8k=x"], ["question"])
    (tmp_path / "gsm8k.jsonl").write_text('{"q": "?", "answer": "1"}')
    request = sources.request_for(benchmark, [str(tmp_path)], ["gsm8k.question=q", "amc.question=z"])
    assert Path(request.path).name == "gsm8k.jsonl" and request.fields == {"question": "q"}
    assert [item.task.question for item in sources.load(request, "test", None)] == ["?"]

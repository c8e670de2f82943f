"""Folders of runs for tests of the report: made from real iterations and episodes, or from numbers that a test chooses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

REAL = Path(__file__).resolve().parents[2] / "docs" / "results" / "quickstart-50"

HOSTILE = [
    "</script><script>document.title = 'taken'</script>", "<img src=x onerror=\"document.title = 'taken'\">", "\x00\x1b[31m\u202ereversed",
    "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;", "'\"><svg onload=alert(1)>", "\ud800 alone", "<!--", "]]>",
]  # fmt: skip


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def made_run(folder: Path, count: int, recipe: dict | None = None, **metrics: Callable[[int], float | None]) -> Path:
    """A run of `count` iterations. A metric's name has `__` for `/`; its function gives the value of an iteration."""
    folder.mkdir(parents=True)
    records = [
        {"iteration": number, **{name.replace("__", "/"): value(number) for name, value in metrics.items()}}
        for number in range(1, count + 1)
    ]
    write_lines(folder / "metrics.jsonl", records)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def repeated_run(folder: Path, iterations: int = 50, passages: int = 64) -> Path:
    """The metrics of a real run of 50 iterations, and its real episodes of the first and the last of them, repeated until
    every iteration has `passages`. Each repetition has its words in another order, so that it takes as much room as a new one."""
    folder.mkdir(parents=True)
    records = [json.loads(line) for line in (REAL / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", records[:iterations])
    episodes = [json.loads(line) for line in (REAL / "episodes.jsonl").read_text().splitlines()]
    half, chance = len(episodes) // 2, random.Random(0)
    repeated = []
    for number in range(1, iterations + 1):
        sources = episodes[:half] if number <= iterations // 2 else episodes[half:]
        repeated += [{**_reordered(sources[slot % half], chance), "iteration": number, "slot": slot} for slot in range(passages)]
    # As the log writes them: the iteration first.
    write_lines(folder / "episodes.jsonl", [{"iteration": each["iteration"], **each} for each in repeated])
    (folder / "recipe.yaml").write_text(json.dumps({"run": {"dir": "runs/repeated"}, "train": {"seed": 0, "passages": passages}}))
    return folder


def _reordered(value: object, chance: random.Random) -> object:
    if isinstance(value, dict):
        return {key: _reordered(item, chance) for key, item in value.items()}
    if isinstance(value, list):
        return [_reordered(item, chance) for item in value]
    if isinstance(value, str) and " " in value.strip():
        words = value.split(" ")
        chance.shuffle(words)
        return " ".join(words)
    return value


def episode(iteration: int, question: str = "How many?", gold: str = "3", passage: str = "Three.", answers: tuple[str, ...] = ("3", "4"), **attempt: object) -> dict:
    """An episode with one attempt, as the log has it."""
    judged = [
        {"text": f" {text}", "tokens": 2, "finish": "stop", "extracted": text, "correct": text == gold, "why": "exact" if text == gold else "different", "reward": float(text == gold)}
        for text in answers
    ]  # fmt: skip
    made = {
        "text": f" {question}\nAnswer: {gold}", "tokens": 9, "finish": "stop", "valid": True, "invalid": None, "grounded": False, "in_group": True, "reward": 0.5,
        "task": {"question": question, "gold_answer": gold, "answer_type": "String"}, "is_reasoner_task": True, "answers": judged,
    }  # fmt: skip
    return {
        "iteration": iteration, "slot": 0, "passage": {"index": 1, "document": 1, "source": "made", "text": passage}, "answer_type": "String",
        "attempts": [{**made, **attempt}],
    }  # fmt: skip


def hostile_run(folder: Path) -> Path:
    """A run whose every text would like to be more than a text."""
    made_run(folder, 6, {"game": {"</td><script>": HOSTILE[0]}}, challenger__reward=lambda number: number / 10)
    records = [episode(number, text, text, text, (text, HOSTILE[1])) for number in range(1, 7) for text in HOSTILE]
    for record, text in zip(records, HOSTILE * 6):
        record["passage"]["source"] = record["attempts"][0]["invalid"] = text
    write_lines(folder / "episodes.jsonl", records)
    pair = {"challenger": HOSTILE[0], "reasoner": HOSTILE[1], "pass_rate": 0.5, "low": None, "high": None}
    (folder / "crossplay").mkdir()
    (folder / "crossplay" / "matrix.json").write_text(json.dumps({"pairs": [pair]}))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "<b>.json").write_text('{"iteration": 0, "tasks": {"<i onclick=x>": 0.5}}')
    return folder

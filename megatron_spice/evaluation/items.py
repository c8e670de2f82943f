"""From rows to items: which field means what, and the question as the Reasoner of the game would be asked it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spice.evaluation.gold import read_gold, task_of
from megatron_spice.evaluation.matching import read_tolerances
from megatron_spice.evaluation.rows import Row
from megatron_spice.evaluation.tasks import OPTIONAL, Benchmark, Fields
from megatron_spice.game.options import letter_of
from megatron_spice.game.records import Task

MOST_OPTIONS = 26


@dataclass(frozen=True, slots=True)
class Item:
    """One question; `id` is unique in its benchmark. `tolerances`: see `matching.verdict`."""

    id: str
    task: Task
    tolerances: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What a log keeps of it, beside the answers: everything that decides what is asked and what is right."""
        about = {"id": self.id, "question": self.task.question, "gold": self.task.gold_answer, "answer_type": self.task.answer_type}
        return about | ({"tolerances": list(self.tolerances)} if self.tolerances else {})


def make_items(benchmark: Benchmark, rows: Sequence[Row], given: Mapping[str, str], source: str) -> list[Item]:
    """The items of a benchmark's rows.

    Args:
        given: field names that were given by hand, by their meaning.
        source: where the rows are from, for error messages.

    Raises:
        ValueError: a field is missing (those that are there are named), or a row holds no question or answer.
    """
    there = list(dict.fromkeys(name for row in rows for name in row))
    fields = choose_fields(benchmark, there, given, source)
    items: list[Item] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        try:
            values = {meaning: row.get(name) for meaning, name in fields.items()}
            task, tolerances = _task(values, benchmark.kind), read_tolerances(values.get("tolerance"))
        except ValueError as error:
            raise ValueError(f"{benchmark.name}: row {number} of {source}: {error}") from None
        name = str(row[fields["id"]]) if "id" in fields and row.get(fields["id"]) not in (None, "") else str(number)
        name = name if name not in seen else f"{name} (row {number})"
        seen.add(name)
        items.append(Item(name, task, tolerances))
    return items


def choose_fields(benchmark: Benchmark, there: Sequence[str], given: Mapping[str, str], source: str) -> dict[str, str]:
    """`meaning -> field` for the first of the benchmark's layouts that the rows have."""
    for meaning, name in given.items():
        if name not in there:
            raise ValueError(f"{benchmark.name}: --map {meaning}={name}: {source} has no field {name!r}; it has {_named(there)}")
    known = {meaning for layout in benchmark.layouts for meaning in layout}
    if unknown := set(given) - known:
        raise ValueError(f"{benchmark.name}: --map {min(unknown)}=...: there is no such meaning; there are {', '.join(sorted(known))}")
    problems = []
    for layout in benchmark.layouts:
        found = {meaning: name for meaning in layout if (name := _field(meaning, layout, there, given))}
        missing = [meaning for meaning in layout if meaning not in found and meaning not in OPTIONAL]
        if not missing:
            return found
        problems.append(", ".join(f"{meaning} ({' or '.join(layout[meaning])})" for meaning in missing))
    raise ValueError(
        f"{benchmark.name}: {source} has no field for {'; nor for '.join(problems)}; it has {_named(there)}: "
        f"name them by --map {benchmark.name}.question=FIELD"
    )


def _field(meaning: str, layout: Fields, there: Sequence[str], given: Mapping[str, str]) -> str | None:
    if meaning in given:
        return given[meaning]
    by_lower = {name.lower(): name for name in there}
    return next((by_lower[name] for name in layout[meaning] if name in by_lower), None)


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:20])) or "none"


def _task(values: Mapping[str, Any], kind: str) -> Task:
    question = values["question"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its question is {question!r:.60}, expected a text")
    question = question.strip()
    context = values.get("context")
    if isinstance(context, str) and context.strip() and context.strip() not in question:
        question = f"{context.strip()}\n{question}"
    if "correct" in values:
        return _shuffled(question, [values["correct"], values["wrong1"], values["wrong2"], values["wrong3"]])
    if "options" in values:
        return _choice(question, values["options"], values["letter"])
    gold, answer_type = task_of(read_gold(values["answer"]), kind)
    return Task(question, gold, answer_type)


def _choice(question: str, options: Any, right: Any) -> Task:
    if not isinstance(options, list) or not 2 <= len(options) <= MOST_OPTIONS:
        raise ValueError(f"its options are {options!r:.80}, expected a list of 2 to {MOST_OPTIONS}")
    texts = [str(option).strip() for option in options]
    asked = question_with(question, texts)
    last = chr(ord("A") + len(texts) - 1)
    if isinstance(right, (int, float)) and not isinstance(right, bool):
        letter = chr(ord("A") + int(right)) if 0 <= right < len(texts) else None
    else:
        letter = letter_of(str(right), asked, gold=last)
        if letter is None and str(right).strip() in texts:  # options that are too alike to be told apart as answers
            letter = chr(ord("A") + texts.index(str(right).strip()))
    if letter is None or letter > last:
        raise ValueError(f"its right option is {right!r:.60}, expected a letter from A to {last}, its number from 0, or its text")
    return Task(asked, letter, "MCQ")


def _shuffled(question: str, texts: Sequence[Any]) -> Task:
    """Options in an order that depends on the question alone: the same for every model and every run."""
    order = list(range(len(texts)))
    random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
    asked = question_with(question, [str(texts[place]).strip() for place in order])
    return Task(asked, "ABCD"[order.index(0)], "MCQ")


def question_with(stem: str, options: Sequence[str]) -> str:
    """A stem with its options on lines of their own, as the game's multiple choice tasks have them."""
    return "\n".join([stem, *(f"{chr(ord('A') + place)}) {' '.join(text.split())}" for place, text in enumerate(options))])

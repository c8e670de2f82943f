"""What can be evaluated on, as one table: the paper's eleven benchmarks [section 3.1, table 1] and how each is decoded and read.

A benchmark's rows come from files that the user has (`rows.py`). `fields` says which of their fields mean what: for each
meaning the names of the public layouts, tried in order, whatever their capitals. Meanings are

    question, answer        a question and its gold answer
    options, letter         a list of options, and the letter, number or text of the right one
    correct, wrong1..3      GPQA's own layout: options in no order, which are shuffled by a seed made of the question
    id                      anything; the row's number where it is missing
    context                 if there is one: what stands before the question
    tolerance               if there is one: how far from the gold number an answer may be, or one for each of several numbers

How a gold answer is read does not depend on the benchmark (`gold.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Fields = Mapping[str, tuple[str, ...]]

_QUESTION = ("question", "problem", "input", "prompt")
_ANSWER = ("answer", "final_answer", "target", "solution")
_ID = ("unique_id", "question_id", "uuid", "record id", "id")
OPEN: Fields = {"question": _QUESTION, "answer": _ANSWER, "id": _ID}
CHOICE: Fields = {
    "question": _QUESTION, "options": ("options", "choices"), "letter": ("answer_letter", "answer", "answer_index"), "id": _ID,
}  # fmt: skip
OPTIONAL = ("id", "context", "tolerance")
"""Meanings that a layout's rows need not have."""
OLYMPIAD: Fields = OPEN | {"answer": ("final_answer", "answer"), "context": ("context",), "tolerance": ("error",)}
GPQA: Fields = {
    "question": _QUESTION, "correct": ("correct answer",), "wrong1": ("incorrect answer 1",),
    "wrong2": ("incorrect answer 2",), "wrong3": ("incorrect answer 3",), "id": _ID,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One column of the results.

    `samples` answers are drawn at `temperature` for each question, and their mean counts (1 and 0.0: greedy). `layouts` are
    tried in order: the first whose needed fields are all there is used. `files` is what the names of its files have in the
    repositories that hold others beside, and `parts` whether there are several of them (`rows.py`). `kind` "mathematics" lets a judge decide what the
    rules call different, and reads `x y` as an expression; "text" does neither.
    """

    name: str
    column: str
    kind: Literal["mathematics", "text"]
    layouts: tuple[Fields, ...] = (OPEN,)
    samples: int = 1
    temperature: float = 0.0
    files: str = ""
    parts: bool = False
    about: str = ""


PAPER = (
    Benchmark("amc", "AMC", "mathematics", about="AMC 2023: math-ai/amc23 (40) or AI-MO/aimo-validation-amc (83)"),
    Benchmark("minerva", "Minerva", "mathematics", about="Minerva Math: math-ai/minervamath (272)"),
    Benchmark("math500", "MATH500", "mathematics", about="MATH-500: HuggingFaceH4/MATH-500"),
    Benchmark("gsm8k", "GSM8K", "mathematics", files=r"(?:^|/)main/", about="GSM8K, test: openai/gsm8k (1,319)"),
    Benchmark("olympiad", "Olympiad", "mathematics", (OLYMPIAD,), files="OE_TO_maths_en_COMP", about="OlympiadBench, English open-ended mathematics: Hothan/OlympiadBench OE_TO_maths_en_COMP (674)"),
    Benchmark("aime24", "AIME24", "mathematics", samples=32, temperature=0.6, about="AIME 2024: HuggingFaceH4/aime_2024 or Maxwell-Jia/AIME_2024 (30)"),
    Benchmark("aime25", "AIME25", "mathematics", samples=32, temperature=0.6, files=r"aime_?2025-I", parts=True, about="AIME 2025: math-ai/aime25, yentinglin/aime_2025 or opencompass/AIME2025 (30)"),
    Benchmark("supergpqa", "SuperGPQA", "text", (CHOICE,), about="SuperGPQA: m-a-p/SuperGPQA (26,529), up to ten options"),
    Benchmark("gpqa", "GPQA-D", "text", (GPQA, CHOICE, OPEN), files="gpqa_diamond", about="GPQA-Diamond: Idavidrein/gpqa gpqa_diamond.csv (198)"),
    Benchmark("mmlu_pro", "MMLU-Pro", "text", (CHOICE,), about="MMLU-Pro, test: TIGER-Lab/MMLU-Pro (12,032), up to ten options"),
    Benchmark("bbeh", "BBEH", "text", files=r"(?:^|/)task\.json", parts=True, about="BIG-Bench Extra Hard: BBEH/bbeh, or the task.json files of its repository (without mini)"),
)  # fmt: skip

OFFLINE = (
    Benchmark("factbook", "Factbook", "text", about="facts of the World Factbook's held-out countries, asked without a text"),
    Benchmark("factbook-open", "Factbook-open", "text", about="the same questions with the document's line before them"),
)
PUZZLES = "reasoning-gym/"
"""`reasoning-gym/NAME` is a data set of that package, by its name there."""

BY_NAME = {benchmark.name: benchmark for benchmark in (*PAPER, *OFFLINE)}


@dataclass(frozen=True)
class Request:
    """A benchmark as it was asked for: where its rows are, and field names that were given by hand (`meaning -> field`)."""

    benchmark: Benchmark
    path: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


def find(name: str) -> Benchmark:
    """The benchmark of a name on the command line.

    Raises:
        ValueError: there is none.
    """
    if name.startswith(PUZZLES) and len(name) > len(PUZZLES):
        short = name.removeprefix(PUZZLES)
        return Benchmark(name, short, "text", about="made by the package reasoning-gym from a seed")
    if name not in BY_NAME:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(BY_NAME)}, {PUZZLES}NAME, and `paper` for the first eleven")
    return BY_NAME[name]


def find_all(names: str) -> list[Benchmark]:
    """The benchmarks of a comma-separated list, each once, in the order of the table."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [one for name in wanted for one in ([each.name for each in PAPER] if name == "paper" else [name])]
    if not wanted:
        raise ValueError("--tasks names no task")
    order = list(BY_NAME)
    found = {name: find(name) for name in wanted}
    return sorted(found.values(), key=lambda each: (order.index(each.name) if each.name in order else len(order), each.name))

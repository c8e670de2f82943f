"""A run's episodes as rows of a table: one for each Challenger attempt, with everything that says where it came from.

Streaming: an episode is read, becomes rows, and is forgotten. Only the questions asked so far are remembered, a bounded number
of them, to mark duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spice.game.audit.duplicates import Seen
from megatron_spice.game.audit.flags import flags_of
from megatron_spice.game.options import split_options
from megatron_spice.game.records import Task
from megatron_spice.telemetry.json_lines import each_json_line
from megatron_spice.telemetry.run_log import EPISODES_NAME

RECIPE_NAME = "recipe.yaml"

COLUMNS = {
    "run": "string", "recipe_hash": "string", "model": "string", "iteration": "int32", "begun": "int32", "slot": "int32",
    "passage_index": "int64", "document": "int64", "source": "string", "passage": "string", "prompt_style": "string",
    "reasoner_prompt_style": "string", "attempt": "int32", "weights": "string", "completion": "string", "answer_type": "string", "question": "string",
    "gold_answer": "string", "options": "list<string>", "valid": "bool", "invalid_reason": "string", "grounded": "bool",
    "in_group": "bool", "is_reasoner_task": "bool", "reward": "double", "pass_rate": "double", "verdicts": "list<bool>",
    "verdict_reasons": "list<string>", "right_answers": "list<string>", "agreement": "double", "copied_words": "int32",
    "flags": "list<string>", "duplicate": "string",
}  # fmt: skip
"""Every column with its type. Null where there is nothing: a pass rate without answers, a question of an invalid attempt,
`agreement` without an audit that answered again. `completion` is the Challenger's, asked in `prompt_style`, `right_answers` the
Reasoner's, asked in `reasoner_prompt_style`: styles differ where another model writes the tasks. `right_answers` are the texts of the answers that were right, each once;
`duplicate` is "exact" or "near" where the run has asked the question before."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all rows of a run share."""

    folder: Path
    recipe_hash: str
    model: str
    has_corpus: bool

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Reads a run's recipe.

        Raises:
            ValueError: the folder is no run's, or the run wrote no episodes.
        """
        for name, meaning in ((RECIPE_NAME, "is no run's folder"), (EPISODES_NAME, "has no episodes (telemetry.episodes=false?)")):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} {meaning}: {name} is not there")
        text = (folder / RECIPE_NAME).read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        recipe_hash = hashlib.sha256(text.encode()).hexdigest()
        return cls(folder, recipe_hash, str(recipe["policy"]["model"]), not recipe["game"]["no_corpus"])

    def episodes(self) -> Iterator[dict[str, Any]]:
        """The episodes of the log, one at a time."""
        return each_json_line(self.folder / EPISODES_NAME)


def rows(run: Run, memory: int = 100_000) -> Iterator[dict[str, Any]]:
    """A row for each attempt of a run, in the order of its log. `memory`: questions that duplicates are looked for among."""
    seen = Seen(memory)
    for episode in run.episodes():
        for number, attempt in enumerate(episode["attempts"]):
            yield _row(run, episode, number, attempt, seen)


def _row(run: Run, episode: dict[str, Any], number: int, attempt: dict[str, Any], seen: Seen) -> dict[str, Any]:
    passage, answers = episode["passage"], attempt["answers"]
    again = attempt.get("grounded_answers", [])
    row = dict.fromkeys(COLUMNS) | {
        "run": run.folder.name, "recipe_hash": run.recipe_hash, "model": run.model,
        "iteration": episode["iteration"], "begun": episode["begun"], "slot": episode["slot"],
        "passage_index": passage["index"], "document": passage["document"], "source": passage["source"],
        "passage": passage["text"] if run.has_corpus else None, "prompt_style": episode["prompt_style"],
        "reasoner_prompt_style": episode.get("reasoner_prompt_style", episode["prompt_style"]),
        "answer_type": episode["answer_type"], "attempt": number, "weights": attempt["weights"], "completion": attempt["text"],
        "valid": attempt["valid"], "invalid_reason": attempt["invalid"], "grounded": attempt["grounded"],
        "in_group": attempt["in_group"], "is_reasoner_task": attempt["is_reasoner_task"], "reward": attempt["reward"],
        "pass_rate": _share(answers), "verdicts": [answer["correct"] for answer in answers],
        "verdict_reasons": [answer["why"] for answer in answers],
        "right_answers": list(dict.fromkeys(answer["text"] for answer in answers if answer["correct"])),
        "agreement": _share(again), "options": [], "flags": [],
    }  # fmt: skip
    if attempt["task"] is None:
        return row
    task = Task(**attempt["task"])
    flags = flags_of(task, passage["text"] if run.has_corpus else None)
    split = split_options(task.question) if task.answer_type == "MCQ" else None
    return row | {
        "question": task.question, "gold_answer": task.gold_answer, "options": list(split[1].values()) if split else [],
        "copied_words": flags.copied_words, "flags": flags.names(), "duplicate": seen.add(task.question),
    }  # fmt: skip


def _share(answers: list[dict[str, Any]]) -> float | None:
    return sum(answer["correct"] for answer in answers) / len(answers) if answers else None

"""The log of a run that never was: one task again and again, for what reads curricula."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write_run(folder: Path, completion: str, question: str, gold: str, count: int, **styles: str) -> Path:
    """A run's recipe and episodes: an Integer task a passage, met by one of two answers. `styles`: of the prompts, if not few-shot."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"policy": {"model": "made"}, "game": {"no_corpus": False}}))
    answers = [{"text": gold, "correct": True, "why": "exact"}, {"text": "0", "correct": False, "why": "number"}]
    attempt = {
        "text": completion, "weights": "0", "valid": True, "invalid": None, "grounded": False, "in_group": True, "reward": 1.0,
        "task": {"question": question, "gold_answer": gold, "answer_type": "Integer"}, "is_reasoner_task": True, "answers": answers,
    }  # fmt: skip
    episodes = [
        {
            "iteration": 1, "begun": 1, "slot": number, "prompt_style": "few_shot", "answer_type": "Integer", "attempts": [attempt],
            "passage": {"index": number, "document": number, "source": "made", "text": f"Passage number {number}."},
            **styles,
        }
        for number in range(count)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return folder

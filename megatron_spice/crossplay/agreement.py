"""Whether a reader of the passage gives a run's gold answers: an audit after the run, by any model.

The run's own audit (`audit.grounded_answers`) asks the policy itself, which shares its writer's mistakes. A stronger model asked
afterwards, over the whole run, says more. Tasks are drawn evenly over the run, one a passage: the one the Reasoner was trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_spice.config.schema import Config
from megatron_spice.crossplay.matrix import interval
from megatron_spice.crossplay.players import Player, served
from megatron_spice.crossplay.session import note, noted, refusal, session
from megatron_spice.curriculum.rows import Run
from megatron_spice.game.audit.reanswer import grounded_answers
from megatron_spice.game.play import Table
from megatron_spice.game.records import Passage, Task
from megatron_spice.rollout.engine import EngineRefused

FOLDER = "audit"
PARTS = 4
"""Parts of a run that agreement is told for."""


def ask(run: Run, config: Config, reader: Player, tasks: int, answers: int, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Lets `reader` answer up to `tasks` of the run's tasks with their passages in view, `answers` times each.

    Lines go to the run's `audit/agreement-NAME.jsonl` with the reader's identity, and are not asked for again; those of
    another reader of this name, of other tasks and with another number of answers stay there and do not count. A task that the reader's engine refuses (passage and question may be too long for
    it) is noted with the refusal and left out of all numbers but `refused`. Returns the summary.

    Raises:
        ValueError: there is nothing to ask: no task, or tasks were written without passages; or the reader refused all of them.
        EngineError: the reader's engine failed.
    """
    if not run.has_corpus:
        raise ValueError(f"{run.folder} wrote its tasks without passages (game.no_corpus=true): nobody can read them again")
    path = run.folder / FOLDER / f"agreement-{reader.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    wanted = _sample(run, tasks)
    if not wanted:
        raise ValueError(f"{run.folder} has no task to ask again")
    identity = reader.identity(config)
    there = _of(path, identity, wanted, answers)
    items = [(item["slot"], item) for item in wanted if _key(item) not in there]

    async def again(table: Table, item: dict[str, Any]) -> None:
        found = item["passage"]
        passage = Passage(found["index"], found["document"], found["source"], (), found["text"])
        line = {key: item[key] for key in ("iteration", "begun", "slot", "task", "pass_rate")} | {"reader": identity}
        try:
            said = await grounded_answers(table, Task(**item["task"]), passage, answers, f"agreement {item['begun']}")
        except EngineRefused as error:
            note(path, line | {"refused": refusal(error)})
            return
        line |= {"correct": [each.verdict.correct for each in said], "extracted": [each.verdict.extracted for each in said]}
        note(path, line)

    if items:
        say(f"{reader.name} answers {len(items)} tasks with their passages in view")
        with served(reader, config, run.folder / FOLDER, device) as (engine, tokenizer):
            asyncio.run(session(config, engine, tokenizer, 0, items, again))
    found = summary(list(_of(path, identity, wanted, answers).values()))
    if found["refused"]:
        say(f"{reader.name} refused {found['refused']} of the tasks, which do not count; why is in {path}")
    return found


def _of(path: Path, reader: str, wanted: list[dict[str, Any]], answers: int) -> dict[tuple, dict[str, Any]]:
    """By task, what this reader has said to the wanted ones, so many times each."""
    keys = {_key(item) for item in wanted}
    mine = (line for line in noted(path) if line.get("reader") == reader and _key(line) in keys)
    return {_key(line): line for line in mine if "refused" in line or len(line["correct"]) == answers}


def _key(line: dict[str, Any]) -> tuple:
    """What tells a task from all others, also from those of a run that was begun anew in the same folder."""
    return (line["begun"], line["slot"], *line["task"].values())


def _sample(run: Run, count: int) -> list[dict[str, Any]]:
    """Up to `count` of the Reasoner's tasks, evenly over the run, with their passages."""
    total = sum(any(attempt["is_reasoner_task"] for attempt in episode["attempts"]) for episode in run.episodes())
    keep = {number * total // count for number in range(count)} if total > count else set(range(total))
    found, number = [], 0
    for episode in run.episodes():
        for attempt in episode["attempts"]:
            if not attempt["is_reasoner_task"]:
                continue
            if number in keep:
                rate = fmean(answer["correct"] for answer in attempt["answers"])
                same = {key: episode[key] for key in ("iteration", "begun", "slot", "passage")}
                found.append({**same, "task": attempt["task"], "pass_rate": rate})
            number += 1
    return found


def summary(noted_lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement, with its interval over tasks, and the pass rate of the same tasks, of the whole run and of its parts; `refused`
    tasks are counted beside.

    Raises:
        ValueError: all were refused.
    """
    answered = [line for line in noted_lines if "refused" not in line]
    if not answered:
        raise ValueError(f"all {len(noted_lines)} tasks were refused; the first: {noted_lines[0]['refused']}")
    lines = sorted(answered, key=lambda line: (line["iteration"], line["slot"]))
    cuts = [number * len(lines) // PARTS for number in range(PARTS + 1)]
    parts = [lines[start:end] for start, end in zip(cuts, cuts[1:]) if start < end]
    return {"all": _told(lines), "parts": [_told(part) for part in parts], "refused": len(noted_lines) - len(lines)}


def _told(lines: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [fmean(line["correct"]) for line in lines]
    low, high = interval(rates)
    passed = fmean(line["pass_rate"] for line in lines)
    return {
        "iterations": [lines[0]["iteration"], lines[-1]["iteration"]], "tasks": len(lines), "agreement": fmean(rates), "low": low,
        "high": high, "pass_rate": passed, "pass_minus_agreement": passed - fmean(rates),
    }  # fmt: skip

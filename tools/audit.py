#!/usr/bin/env python3
"""Audits the tasks that a run has written, after the run and over all of it.

    python tools/audit.py runs/quickstart                                   # looks: duplicates, copies, letters, giveaways
    python tools/audit.py runs/quickstart --reader http://127.0.0.1:30000   # and lets a model answer with the passage in view

A reader is a checkpoint, a Hugging Face folder or the URL of an SGLang server (key in SPICE_CHALLENGER_KEY), best a stronger model
than the run's. A server is asked in its model's tokens: give its tokenizer (--tokenizer FOLDER), unless it is found where the server
says, or is the run's own, which is taken where both vocabularies have the same size. The result is of the tasks and the number of
answers that are asked for, and of the reader's present weights; what it has said already is not asked again. It is printed and
written to RUN_DIR/audit/audit.json. What the numbers mean: megatron_spice/game/audit/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice import machine  # noqa: E402
from megatron_spice.config.errors import ConfigError  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.crossplay import agreement  # noqa: E402
from megatron_spice.crossplay.players import MODELS, check, players  # noqa: E402
from megatron_spice.curriculum.rows import RECIPE_NAME, Run, rows  # noqa: E402
from megatron_spice.game.audit import bias  # noqa: E402
from megatron_spice.game.options import LETTERS  # noqa: E402
from megatron_spice.game.records import Task  # noqa: E402
from megatron_spice.rollout.engine import EngineError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--reader", metavar="[NAME=]MODEL", help="answers tasks again, passage in view")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="of a server's model")
    parser.add_argument("--tasks", type=int, default=200, help="tasks that it answers, evenly over the run [%(default)s]")
    parser.add_argument("--answers", type=int, default=4, help="answers to each [%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="over the run's recipe, for the reader's engine")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _audit(options)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"audit: {error}\nThe same command goes on from here", file=sys.stderr)
        return 1


def _audit(options: argparse.Namespace) -> int:
    if min(options.tasks, options.answers) < 1:
        raise ValueError(f"--tasks={options.tasks} and --answers={options.answers} must be 1 or more")
    run = Run.open(options.run_dir)
    found: dict[str, Any] = {"run": run.folder.name, "recipe_hash": run.recipe_hash, **looks(run)}
    if options.reader:
        [reader] = players(options.reader)
        reader = replace(reader, tokenizer=options.tokenizer)
        check(reader)
        config = load_config(run.folder / RECIPE_NAME, options.overrides)
        device = machine.device(config.cluster.device)
        found[f"agreement with {reader.name}"] = agreement.ask(run, config, reader, options.tasks, options.answers, device, _say)
        shutil.rmtree(run.folder / agreement.FOLDER / MODELS, ignore_errors=True)
    (run.folder / agreement.FOLDER).mkdir(exist_ok=True)
    text = json.dumps(found, indent=1)
    (run.folder / agreement.FOLDER / "audit.json").write_text(text + "\n")
    print(text)
    return 0


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def looks(run: Run) -> dict[str, Any]:
    """What can be said of all valid tasks of a run without asking anybody."""
    golds: list[str] = []
    forms: list[str] = []
    counts: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    for row in rows(run):
        if not row["valid"]:
            continue
        task = Task(row["question"], row["gold_answer"], row["answer_type"])
        golds.append(bias.gold_key(task))
        forms.append(bias.form_of(task.question))
        counts.update(["tasks", *row["flags"], *([f"{row['duplicate']} duplicate"] if row["duplicate"] else [])])
        if task.answer_type == "MCQ":
            letters[task.gold_answer] += 1
            counts["longest option"] += bool(bias.is_longest_option(task))
    total = counts.pop("tasks", 0)
    if not total:
        return {"tasks": 0}
    statistic, chance = bias.letter_bias(letters)
    multiple = {"letters": {letter: letters[letter] for letter in LETTERS}, "chi2": statistic, "p": chance}
    return {
        "tasks": total,
        "shares": {name: counts[name] / total for name in ("exact duplicate", "near duplicate", "copied", "refers", "gives_away")},
        "constant_gold": bias.constant_share(golds),
        "form_gold": bias.form_share(forms, golds),
        "most frequent gold": [[gold.partition(" ")[2], count] for gold, count in Counter(golds).most_common(5)],
        "multiple choice": multiple | {"longest_option": counts["longest option"] / letters.total()} if letters else None,
    }


if __name__ == "__main__":
    sys.exit(main())

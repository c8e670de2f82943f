#!/usr/bin/env python3
"""How good is a model? And: is an answer right? Both with training's own prompts, extraction and verifier.

    python tools/evaluate.py MODEL --tasks gsm8k,aime24,factbook --data FOLDER      # a checkpoint, or a server's address
    python tools/evaluate.py MODEL --tasks paper --data FOLDER --judge URL          # all eleven columns of the paper
    python tools/evaluate.py tasks                                                  # what there is, and from which fields
    python tools/evaluate.py hold-out assets/factbook.jsonl TRAIN.jsonl HELD_OUT.jsonl
    python tools/evaluate.py grade ANSWERS.jsonl > VERDICTS.jsonl

An evaluation keeps every answer in its --output folder; a command that was stopped goes on when it is given again. `hold-out`
cuts the documents that `--tasks factbook` asks about out of a corpus.

Each line of ANSWERS is {"gold": ..., "answer_type": "MCQ" | "Integer" | "Expression" | "String", "response": ...}, with a
`question` and an `id` if there are any; `-` reads standard input. Each line of the output is the verdict on the same line of
the input: {"correct": true, "extracted": "42", "reason": "number"}, or {"error": ...} for a line that is no record, or whose
gold answer is none of its type (an integer such as 42 or 1,234; a letter such as C, (c) or C), or an option's own text).
Exit codes: 0 done, 1 some lines were not graded, 2 wrong arguments or input, or a server that failed, 130 stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.config.schema import VerifierConfig  # noqa: E402
from megatron_spice.evaluation import command, factbook, tasks  # noqa: E402
from megatron_spice.game.grade import grade  # noqa: E402


COMMANDS = ("grade", "tasks", "hold-out", "run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; `run` may be left out."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in (*COMMANDS, "-h", "--help"):
        given = ["run", *given]
    options = _parser().parse_args(given)
    try:
        return options.run(options)
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="MODEL|COMMAND")
    run = commands.add_parser("run", help="evaluate a model (the word may be left out)")
    command.add_options(run)
    run.set_defaults(run=command.run)
    grading = commands.add_parser("grade", help="judge lines of {gold, answer_type, response}")
    grading.add_argument("answers", metavar="ANSWERS.jsonl", help="file, or - for standard input")
    defaults = VerifierConfig()
    grading.add_argument("--workers", type=command.positive, default=2, help="processes that run Math-Verify [%(default)s]")
    grading.add_argument(
        "--timeout", type=float, default=defaults.timeout, help="seconds one comparison may take [%(default)s]"
    )
    grading.set_defaults(run=grade_file)
    listing = commands.add_parser("tasks", help="the tasks, and which fields their rows may have")
    listing.set_defaults(run=list_tasks)
    cut = commands.add_parser("hold-out", help="cut the documents of --tasks factbook out of a corpus")
    for name in ("documents", "train", "held_out"):
        cut.add_argument(name, type=Path)
    cut.set_defaults(run=hold_out)
    return parser


def grade_file(options: argparse.Namespace) -> int:
    """Judges the lines of a file."""
    file = sys.stdin.buffer if options.answers == "-" else open(options.answers, "rb")  # noqa: SIM115 (closed below)
    with file:
        config = VerifierConfig(workers=options.workers, timeout=options.timeout)
        return asyncio.run(_grade(file, config))


def list_tasks(options: argparse.Namespace) -> int:
    """Prints the table of tasks."""
    for benchmark in (*tasks.PAPER, *tasks.OFFLINE):
        how = "greedy" if benchmark.samples == 1 else f"mean of {benchmark.samples} at temperature {benchmark.temperature}"
        print(f"{benchmark.name:14} {benchmark.about}; {how}")
        for layout in benchmark.layouts if benchmark in tasks.PAPER else ():
            print("".ljust(15) + "; ".join(f"{_meaning(meaning)}: {' | '.join(names)}" for meaning, names in layout.items()))
    print(f"{tasks.PUZZLES + 'NAME':14}\n{'':15}any data set of the package reasoning-gym with one right answer a question; greedy")
    return 0


def _meaning(meaning: str) -> str:
    """A meaning as it is listed; of those that a row need not have, what they do."""
    told = {"context": " (stands before the question)", "tolerance": " (how far from the gold number an answer may be)"}
    return meaning + told.get(meaning, "")


def hold_out(options: argparse.Namespace) -> int:
    """Cuts a corpus into what training may see and what it may not."""
    for target in (options.train, options.held_out):
        if target.exists():
            raise ValueError(f"{target} exists; remove it or name another")
    kept, held = factbook.split(options.documents, options.train, options.held_out)
    print(f"{options.train}: {kept} documents to train on; {options.held_out}: {held} held out")
    return 0


async def _grade(file: IO[bytes], config: VerifierConfig) -> int:
    reasons: Counter[str] = Counter()
    correct = failed = 0
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # half a surrogate pair as JSON spells it
    async for verdict in grade(_records(file), config):
        print(json.dumps(verdict, ensure_ascii=False))
        failed += "error" in verdict
        correct += verdict.get("correct", False)
        reasons[verdict.get("reason", "error")] += 1
    graded = sum(reasons.values()) - failed
    share = f" ({correct / graded:.1%})" if graded else ""
    how = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{correct} of {graded} correct{share}; {how or 'no line'}", file=sys.stderr)
    return 1 if failed else 0


def _records(file: IO[bytes]) -> Iterator[Any]:
    """What each line holds; for one that is not JSON, the error, which is no record and says why."""
    for line in file:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield error


if __name__ == "__main__":
    sys.exit(main())

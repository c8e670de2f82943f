#!/usr/bin/env python3
"""Grades answers with training's own extraction and verifier.

    python tools/evaluate.py grade ANSWERS.jsonl > VERDICTS.jsonl

Each line of ANSWERS is {"gold": ..., "answer_type": "MCQ" | "Integer" | "Expression" | "String", "response": ...}, with a
`question` and an `id` if there are any; `-` reads standard input. Each line of the output is the verdict on the same line of
the input: {"correct": true, "extracted": "42", "reason": "number"}, or {"error": ...} for a line that is no record.
Exit codes: 0 all lines were graded, 1 some were not, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.config.schema import VerifierConfig  # noqa: E402
from megatron_spice.game.grade import grade  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("grade", help="judge lines of {gold, answer_type, response}")
    command.add_argument("answers", metavar="ANSWERS.jsonl", help="file, or - for standard input")
    defaults = VerifierConfig()
    command.add_argument("--workers", type=_positive, default=2, help="processes that run Math-Verify [%(default)s]")
    command.add_argument(
        "--timeout", type=float, default=defaults.timeout, help="seconds one comparison may take [%(default)s]"
    )
    options = parser.parse_args(arguments)
    try:
        file = sys.stdin.buffer if options.answers == "-" else open(options.answers, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    with file:
        config = VerifierConfig(workers=options.workers, timeout=options.timeout)
        return asyncio.run(_grade(file, config))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


async def _grade(file: IO[bytes], config: VerifierConfig) -> int:
    reasons: Counter[str] = Counter()
    correct = failed = 0
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

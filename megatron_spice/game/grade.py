"""Grading outside of a game: what training's extraction and verifier make of answers that somebody else collected.

A record is {"gold": ..., "answer_type": "MCQ" | "Integer" | "Expression" | "String", "response": ...}, and optionally the
`question`, whose options decide what a letter means. A response's answer is what its last complete box holds. A gold answer
that its type does not allow is an error of the record: whatever the response said would count as wrong, or stop the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, get_args

from megatron_spice.config.schema import AnswerType, VerifierConfig
from megatron_spice.game.extract import last_boxed
from megatron_spice.game.numerals import is_integer
from megatron_spice.game.options import letter_of, options_in
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier

IN_FLIGHT = 4
"""Records a worker that are being judged at a time."""


def read_record(record: Any) -> tuple[Task, str]:
    """The task and the response of a record.

    Raises:
        ValueError: a field is missing or not what it must be; the message names it.
    """
    if isinstance(record, Exception):  # what reading the line has come to
        raise ValueError(f"not JSON: {record}")
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with gold, answer_type and response")
    for field in ("gold", "answer_type", "response"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field} is {_shown(record.get(field))}, expected a string")
    kinds = get_args(AnswerType)
    if record["answer_type"] not in kinds:
        raise ValueError(f"answer_type is {record['answer_type']!r}, expected one of {', '.join(kinds)}")
    question = record.get("question", "")
    if not isinstance(question, str):
        raise ValueError(f"question is {_shown(question)}, expected a string")
    gold = _checked_gold(record["gold"], record["answer_type"], question)
    return Task(question, gold, record["answer_type"]), record["response"]


def _checked_gold(gold: str, answer_type: str, question: str) -> str:
    """The gold answer as the verifier takes it: the bare letter of `(c)` or `C)`, an integer without spaces around it.

    Raises:
        ValueError: it is none of its type.
    """
    if not gold.strip():
        raise ValueError("gold is empty")
    if answer_type == "Integer":
        if not is_integer(gold.strip()):
            raise ValueError(f"gold is {gold!r:.60}, expected an integer such as 42 or 1,234 for the answer_type Integer")
        return gold.strip()
    if answer_type == "MCQ" and not (len(gold) == 1 and "A" <= gold <= "Z"):
        # Where no options can be read, any letter may be one.
        letter = letter_of(gold, question, gold="" if options_in(question) else "Z")
        if letter is None:
            raise ValueError(f"gold is {gold!r:.60}, expected a letter of an option for the answer_type MCQ")
        return letter
    return gold


def _shown(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


async def grade(records: Iterable[Any], config: VerifierConfig) -> AsyncIterator[dict[str, Any]]:
    """A verdict for each record, in their order, as they come: `correct`, `extracted` and `reason` (see `Verifier.verify`);
    `error` instead for one that is none. An `id` is handed on."""
    async with Verifier(config) as verifier:
        waiting: deque[asyncio.Task[dict[str, Any]]] = deque()
        try:
            for record in records:
                waiting.append(asyncio.create_task(_judge(record, verifier)))
                if len(waiting) >= IN_FLIGHT * config.workers:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for each in waiting:
                each.cancel()


async def _judge(record: Any, verifier: Verifier) -> dict[str, Any]:
    known = {"id": record["id"]} if isinstance(record, dict) and "id" in record else {}
    try:
        task, response = read_record(record)
    except ValueError as error:
        return {**known, "error": str(error)}
    verdict = await verifier.verify(task, last_boxed(response) or None)
    return {**known, "correct": verdict.correct, "extracted": verdict.extracted, "reason": verdict.reason}

"""Is the Reasoner's answer the gold one? Rules by answer type [paper section 2.5: Math-Verify for mathematics, else
exact match].

What can be decided by looking is decided here: letters, normalised strings, whole numbers. Only what needs algebra
goes to Math-Verify, which is slow, can hang, and is easily fooled by what is not mathematics, in a killable worker
process. Every way of not knowing (nothing extracted, too long, timeout, crash) is a wrong answer that says so and is
counted.

The Integer rule is narrower than Math-Verify: a gold integer is met by a number of the same value, with or without a
unit (`42`, `42.0`, `1{,}234 km`, `50%` for 50), by arithmetic that yields it (`6 \\cdot 7`), or by either as the value of
one letter (`x = 42`), never by a factorial, a term with a variable or 0.5 for 50 %. Expressions may have a unit on one
side; on both sides it must be the same. Of a number it may also be written as words or money (`18.90 dollars`, `\\$18.90`).
"""

from __future__ import annotations

import re
from collections import Counter

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.game.expression import (
    exact_decimals,
    list_brackets,
    looks_arithmetic,
    looks_mathematical,
    to_latex,
    without_unit,
)
from megatron_spice.game.numerals import read_integer, read_quantity, read_with_unit
from megatron_spice.game.options import letter_of
from megatron_spice.game.records import Task, Verdict
from megatron_spice.game.text import normalise, strip_latex, undecorated
from megatron_spice.game.verify_pool import WorkerCrash, WorkerPool, WorkerTimeout

_VALUE_OF = re.compile(r"\s*[A-Za-z](?:_(?:\w|\{[^{}]{1,20}\}))?\s*=\s*")


class Verifier:
    """Judges extracted answers. For one asyncio loop: `start`/`close` or `async with`; any number of `verify`s at a
    time.

    `counts` says how often each reason decided, since the start.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._pool = WorkerPool(config)
        self.counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Starts the worker processes. Raises RuntimeError when one does not come up."""
        await self._pool.start()

    async def close(self) -> None:
        """Ends the worker processes."""
        await self._pool.close()

    async def __aenter__(self) -> Verifier:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def timeouts(self) -> int:
        """Comparisons and readings that were cut off, since the start."""
        return self.counts["timeout"]

    async def verify(self, task: Task, answer: str | None) -> Verdict:
        """The verdict on an extracted answer (a prompt style's `extract_answer` finds it in a completion).

        `reason`: "exact", "letter", "number" or "math" say how it was found right or compared; "different" that the
        forms differ beyond comparing, "no_answer", "no_letter", "too_long", "timeout", "crashed" that there was
        nothing to compare.
        """
        correct, reason = await self._judge(task, answer)
        self.counts[reason] += 1
        return Verdict(correct, answer, reason)

    async def read_expression(self, expression: str) -> str:
        """Whether Math-Verify can read an expression: "ok", else "unreadable", "timeout" or "crashed"."""
        readable, reason = await self._ask(to_latex(expression), None)
        if reason == "math":
            return "ok" if readable else "unreadable"
        self.counts[reason] += 1
        return reason

    async def _judge(self, task: Task, answer: str | None) -> tuple[bool, str]:
        if answer is None or not answer.strip():
            return False, "no_answer"
        if len(answer) > self._config.max_chars:
            return False, "too_long"
        if task.answer_type == "MCQ":
            letter = letter_of(answer, task.question, task.gold_answer)
            return (False, "no_letter") if letter is None else (letter == task.gold_answer, "letter")
        if task.answer_type == "String":
            same = normalise(answer) == normalise(task.gold_answer)
            return same, "exact" if same else "different"
        # Not `normalise`: in mathematics a trailing "!" and capitals are no decoration.
        answer = undecorated(answer)
        if _plain(answer) == _plain(task.gold_answer):
            return True, "exact"
        if task.answer_type == "Integer":
            return await self._judge_integer(task.gold_answer, answer)
        return await self._judge_expression(task.gold_answer, answer)

    async def _judge_expression(self, gold: str, answer: str) -> tuple[bool, str]:
        if (same := _is_same_quantity(gold, _VALUE_OF.sub("", answer, count=1) if _VALUE_OF.match(answer) else answer)) is not None:
            return same, "number" if same else "different"
        (gold, gold_unit), (answer, unit) = without_unit(gold), without_unit(answer)
        brackets = {list_brackets(gold), list_brackets(answer)} - {None}
        if (gold_unit and unit and normalise(gold_unit) != normalise(unit)) or len(brackets) > 1:
            return False, "different"
        if not looks_mathematical(answer):
            return False, "different"
        return await self._ask(to_latex(gold), to_latex(answer))

    async def _judge_integer(self, gold: str, answer: str) -> tuple[bool, str]:
        answer = _VALUE_OF.sub("", answer, count=1) if _VALUE_OF.match(answer) else answer
        quantity = read_quantity(answer)
        if quantity is not None:
            return quantity == read_integer(gold), "number"
        if looks_arithmetic(answer):
            return await self._ask(str(read_integer(gold)), exact_decimals(to_latex(answer)))
        return False, "different"

    async def _ask(self, gold: str, prediction: str | None) -> tuple[bool, str]:
        try:
            return await self._pool.ask(gold, prediction), "math"
        except WorkerTimeout:
            return False, "timeout"
        except WorkerCrash:
            return False, "crashed"


def _is_same_quantity(gold: str, answer: str) -> bool | None:
    """Whether numbers with units are the same, None where algebra is to decide: it takes `ab` for a product, and often for a unit; it
    reads neither money nor words."""
    wanted, given = read_with_unit(gold), read_with_unit(answer)
    if wanted is None or given is None or not (wanted[1] or given[1]):
        return None
    if wanted[1] and given[1]:
        is_one_unit, is_another = wanted[1] == given[1], _marks(wanted[1]) != _marks(given[1])
    else:
        unit = wanted[1] or given[1]
        is_one_unit, is_another = unit != "%" and not looks_mathematical(unit), False
    return True if is_one_unit and wanted[0] == given[0] else False if is_another else None


def _marks(unit: str) -> set[str]:
    """What a unit, or a product of variables, is made of."""
    return set(unit) - set(" ^{}/0123456789\u00b0")


def _plain(text: str) -> str:
    """Without spaces, but between digits: `4 2` is not 42."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", strip_latex(text))

"""The cases of grading_cases.jsonl: a completion, what is extracted from it, the verdict, and why it is that.

A response is text, or a list of [text, times] where a megabyte is meant. `style` "line" is a completion after `Answer:`, any
other has its answer in a box. `extracted` is checked where a case has it. The hostile cases are also timed, with a pool of
their own, which must be whole afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.game.extract import answer_line, last_boxed
from megatron_spice.game.records import Task, Verdict
from megatron_spice.game.verify import Verifier

CASES = [json.loads(line) for line in (Path(__file__).parent / "grading_cases.jsonl").read_text().splitlines()]
GROUPS = sorted({case["group"] for case in CASES} - {"hostile"})
HOSTILE = [case for case in CASES if case["group"] == "hostile"]
TIMEOUT = 1.0
LOADED = 25.0
"""Seconds that a fresh worker may take to start on a machine with other things to do."""


def extracted(case: dict) -> str | None:
    response = case["response"]
    text = response if isinstance(response, str) else "".join(piece * times for piece, times in response)
    return answer_line(text) if case.get("style") == "line" else last_boxed(text) or None


async def verdict_on(case: dict, verifier: Verifier) -> Verdict:
    task = Task(case.get("question", "What is it?"), case["gold"], case["answer_type"])
    return await verifier.verify(task, extracted(case))


def mistakes(cases: list[dict], verdicts: list[Verdict]) -> list[str]:
    return [
        f"{case['id']}: {case['answer_type']} {case['gold'][:40]!r} against {(verdict.extracted or '')[:60]!r} was judged "
        f"{verdict.correct} ({verdict.reason}); {case['reason']}"
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.correct != case["correct"] or verdict.extracted != case.get("extracted", verdict.extracted)
    ]


def test_there_are_enough_and_they_say_why():
    assert len(CASES) >= 200 and len({case["id"] for case in CASES}) == len(CASES)
    assert all(case["reason"] and isinstance(case["correct"], bool) for case in CASES)
    for group in GROUPS:  # a verifier that always says the same passes no group
        assert {case["correct"] for case in CASES if case["group"] == group} == {True, False}, group


@pytest.mark.parametrize("group", GROUPS)
def test_cases(group, loop, verifier):
    cases = [case for case in CASES if case["group"] == group]
    verdicts = [loop.run_until_complete(verdict_on(case, verifier)) for case in cases]
    assert mistakes(cases, verdicts) == []


def test_hostile_cases_end_in_time_and_leave_the_pool_whole():
    async def play() -> tuple[list[Verdict], list[float]]:
        async with Verifier(VerifierConfig(workers=2, timeout=TIMEOUT)) as verifier:

            def alive() -> list[int]:
                return sorted(w._process.pid for w in verifier._pool._workers if w._process and w._process.returncode is None)

            async def timed(case: dict) -> tuple[Verdict, float]:
                started = time.monotonic()
                extracted(case)
                return await verdict_on(case, verifier), time.monotonic() - started

            at_first, results = alive(), []
            for pair in zip(HOSTILE[::2], [*HOSTILE[1::2], None]):
                results += await asyncio.gather(*(timed(case) for case in pair if case))
            reasons = Counter(verdict.reason for verdict, _ in results)
            # Both workers are there and answer: those of the start, or as many others as were ended.
            ends = await asyncio.gather(*(verifier.verify(Task("?", "2*x", "Expression"), "x+x") for _ in range(4)))
            lost = [end.reason for end in ends if not end.correct]
            assert set(lost) <= {"timeout"} and len(lost) < len(ends), lost  # a fresh worker of a busy machine may be late once
            replaced = set(alive()) - set(at_first)
            assert len(replaced) <= reasons["timeout"] + reasons["crashed"] + len(lost)
            assert bool(replaced) <= bool(reasons["timeout"] + reasons["crashed"] + len(lost))
            return [verdict for verdict, _ in results], [seconds for _, seconds in results]

    verdicts, seconds = asyncio.run(play())
    in_time = [place for place, verdict in enumerate(verdicts) if verdict.reason != "timeout"]  # on a busy machine anything may
    assert len(in_time) > len(HOSTILE) / 2
    assert mistakes([HOSTILE[place] for place in in_time], [verdicts[place] for place in in_time]) == []
    assert not any(verdict.correct for verdict in verdicts if verdict.reason == "timeout")
    assert max(seconds) < 2 * TIMEOUT + LOADED

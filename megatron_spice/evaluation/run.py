"""Asks a model the questions of a task, grades as training does, and keeps the log.

    question -> answers (the engine) -> what is extracted (the prompt style) -> verdict (the verifier, then the judge) -> log

Questions overlap as far as the engine batches; each is written down when all of its answers are graded. A question that does
not fit the model's context is one that the model cannot answer: it is written down as such, and counts as wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spice.evaluation.context import KEY, TOO_LONG
from megatron_spice.evaluation.endpoint import TooLong
from megatron_spice.evaluation.items import Item
from megatron_spice.evaluation.judge import Judge
from megatron_spice.evaluation.log import TaskLog
from megatron_spice.evaluation.matching import verdict
from megatron_spice.evaluation.model import Model
from megatron_spice.evaluation.score import Score, score
from megatron_spice.evaluation.tasks import Benchmark
from megatron_spice.game.verify import Verifier


@dataclass(frozen=True)
class Result:
    """What came of one task. `rules_only` is the score without the judge; `reasons` counts how answers were decided;
    `cut`, `unanswered`: shares of answers that ran into the limit, and in which nothing was found to extract; `too_long`: how many
    questions did not fit the model's context."""

    benchmark: Benchmark
    score: Score
    rules_only: Score
    reasons: Mapping[str, int]
    cut: float
    unanswered: float
    too_long: int
    mean_tokens: float | None
    seconds: float
    log: Path

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        tokens = None if self.mean_tokens is None else round(self.mean_tokens, 1)
        return {
            "task": self.benchmark.name, "column": self.benchmark.column, **asdict(self.score), "temperature": self.benchmark.temperature,
            "rules_only": self.rules_only.mean, "reasons": dict(self.reasons), "cut": self.cut, "unanswered": self.unanswered,
            "too_long": self.too_long, "mean_tokens": tokens, "seconds": round(self.seconds, 1), "log": self.log.name,
        }  # fmt: skip


@dataclass
class Evaluator:
    """One model with its verifier and, perhaps, a judge. The first two may be None where every question is answered already.

    Args:
        max_tokens: most tokens of an answer.
        in_flight: questions that are asked at a time.
        progress: told (task, finished, all) as questions end.
        context: the model's, None if it is not known (`context.py`).
    """

    model: Model | None
    verifier: Verifier | None
    judge: Judge | None = None
    max_tokens: int = 4096
    in_flight: int = 64
    progress: Callable[[str, int, int], None] = lambda name, done, total: None
    context: int | None = None

    async def run(self, benchmark: Benchmark, items: Sequence[Item], log: TaskLog) -> Result:
        """Answers what the log does not have yet, asks the judge about what it has not judged, and sums up.

        Raises:
            EngineError, EndpointError: a server failed; what was finished is in the log.
        """
        started = time.monotonic()
        unfinished = [item for item in items if item.id not in log.done or self._unjudged(benchmark, log.done[item.id])]
        left, finished = iter(unfinished), len(items) - len(unfinished)
        self.progress(benchmark.name, finished, len(items))

        async def work() -> None:
            nonlocal finished
            for item in left:  # shared: each worker takes the next one
                record = log.done.get(item.id) or {**item.as_json(), "answers": await self._answers(benchmark, item)}
                log.add(await self._judged(benchmark, record))
                finished += 1
                self.progress(benchmark.name, finished, len(items))

        workers = [asyncio.create_task(work()) for _ in range(min(self.in_flight, len(unfinished)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        judge = None if self.judge is None else self.judge.name
        return summary(benchmark, [log.done[item.id] for item in items], time.monotonic() - started, log.path, judge)

    async def _answers(self, benchmark: Benchmark, item: Item) -> list[dict[str, Any]]:
        try:
            replies = await self.model.answer(item.task, benchmark.samples, benchmark.temperature, self.max_tokens)
        except TooLong:
            none = {"response": "", "extracted": None, "correct": False, "reason": TOO_LONG, "finish": TOO_LONG, "tokens": None}
            return [{**none, KEY: self.context}] * benchmark.samples
        answers = []
        for reply in replies:
            extracted = self.model.style.extract_answer(reply.text)
            found = await verdict(self.verifier, item.task, benchmark.kind, item.tolerances, extracted)
            answers.append({
                "response": reply.text, "extracted": extracted, "correct": found.correct, "reason": found.reason,
                "finish": reply.finish, "tokens": reply.tokens, **({KEY: self.context} if reply.lacked_room else {}),
            })  # fmt: skip
        return answers

    def _unjudged(self, benchmark: Benchmark, record: Mapping[str, Any]) -> list[int]:
        """The places of the answers that this judge is to see and has not seen: none that was right, not given or absurdly long."""
        if self.judge is None or benchmark.kind != "mathematics":
            return []
        unseen = [place for place, each in enumerate(record["answers"]) if not each["correct"] and each.get("judged_by") != self.judge.name]
        return [place for place in unseen if record["answers"][place]["reason"] not in ("no_answer", "too_long", TOO_LONG)]

    async def _judged(self, benchmark: Benchmark, record: dict[str, Any]) -> dict[str, Any]:
        """A record with the judge's opinions."""
        answers = list(record["answers"])
        for place in self._unjudged(benchmark, record):
            said = await self.judge.same(record["question"], record["gold"], answers[place]["extracted"] or "")
            answers[place] = {**answers[place], "judge": said, "judged_by": self.judge.name}
        return {**record, "answers": answers}


def summary(benchmark: Benchmark, records: Sequence[Mapping[str, Any]], seconds: float, log: Path, judge: str | None = None) -> Result:
    """The result of a task's records. Of a judge's opinions only those of `judge` count, none where that is None."""
    answers = [answer for record in records for answer in record["answers"]]
    tokens = [answer["tokens"] for answer in answers if answer["tokens"] is not None]
    reasons: Counter[str] = Counter()
    for answer in answers:
        said = answer.get("judge") if _is_judged(answer, judge) else False
        reasons["judge" if said else "judge unclear" if said is None else answer["reason"]] += 1
    return Result(
        benchmark,
        score([[answer["correct"] or (_is_judged(answer, judge) and answer["judge"] is True) for answer in record["answers"]] for record in records]),
        score([[answer["correct"] for answer in record["answers"]] for record in records]),
        dict(reasons.most_common()),
        sum(answer["finish"] == "length" for answer in answers) / len(answers),
        sum(answer["extracted"] is None for answer in answers) / len(answers),
        sum(record["answers"][0]["reason"] == TOO_LONG for record in records),
        sum(tokens) / len(tokens) if tokens else None,
        seconds,
        log,
    )


def _is_judged(answer: Mapping[str, Any], judge: str | None) -> bool:
    return judge is not None and answer.get("judged_by") == judge

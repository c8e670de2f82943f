"""Asks a model the questions of a task, grades as training does, and keeps the log.

    question -> answers (the engine) -> what is extracted (the prompt style) -> verdict (the verifier, then the judge) -> log

Questions overlap as far as the engine batches; each is written down when all of its answers are graded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spice.evaluation.items import Item
from megatron_spice.evaluation.judge import Judge
from megatron_spice.evaluation.log import TaskLog
from megatron_spice.evaluation.model import Model
from megatron_spice.evaluation.score import Score, score
from megatron_spice.evaluation.tasks import Benchmark
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier


@dataclass(frozen=True)
class Result:
    """What came of one task. `rules_only` is the score without the judge; `reasons` counts how answers were decided;
    `cut`, `unanswered`: shares of answers that ran into the limit, and in which nothing was found to extract."""

    benchmark: Benchmark
    score: Score
    rules_only: Score
    reasons: Mapping[str, int]
    cut: float
    unanswered: float
    mean_tokens: float | None
    seconds: float
    log: Path

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        tokens = None if self.mean_tokens is None else round(self.mean_tokens, 1)
        return {
            "task": self.benchmark.name, "column": self.benchmark.column, **asdict(self.score), "temperature": self.benchmark.temperature,
            "rules_only": self.rules_only.mean, "reasons": dict(self.reasons), "cut": self.cut, "unanswered": self.unanswered,
            "mean_tokens": tokens, "seconds": round(self.seconds, 1), "log": self.log.name,
        }  # fmt: skip


@dataclass
class Evaluator:
    """One model with its verifier and, perhaps, a judge.

    Args:
        max_tokens: most tokens of an answer.
        in_flight: questions that are asked at a time.
        progress: told (task, finished, all) as questions end.
    """

    model: Model
    verifier: Verifier
    judge: Judge | None = None
    max_tokens: int = 4096
    in_flight: int = 64
    progress: Callable[[str, int, int], None] = lambda name, done, total: None

    async def run(self, benchmark: Benchmark, items: Sequence[Item], log: TaskLog) -> Result:
        """Answers what the log does not have yet, and sums up.

        Raises:
            EngineError, EndpointError: a server failed; what was finished is in the log.
        """
        started = time.monotonic()
        left = iter([item for item in items if item.id not in log.done])
        self.progress(benchmark.name, len(log.done), len(items))

        async def work() -> None:
            for item in left:  # shared: each worker takes the next one
                log.add(await self._answer(benchmark, item))
                self.progress(benchmark.name, len(log.done), len(items))

        workers = [asyncio.create_task(work()) for _ in range(min(self.in_flight, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return summary(benchmark, [log.done[item.id] for item in items], time.monotonic() - started, log.path)

    async def _answer(self, benchmark: Benchmark, item: Item) -> dict[str, Any]:
        replies = await self.model.answer(item.task, benchmark.samples, benchmark.temperature, self.max_tokens)
        answers = []
        for reply in replies:
            extracted = self.model.style.extract_answer(reply.text)
            verdict = await self.verifier.verify(item.task, extracted)
            answer = {
                "response": reply.text, "extracted": extracted, "correct": verdict.correct, "reason": verdict.reason,
                "finish": reply.finish, "tokens": reply.tokens,
            }  # fmt: skip
            if self._asks_judge(benchmark, verdict.reason, verdict.correct):
                answer["judge"] = await self.judge.same(item.task.question, item.task.gold_answer, extracted or "")
            answers.append(answer)
        task: Task = item.task
        about = {"id": item.id, "question": task.question, "gold": task.gold_answer, "answer_type": task.answer_type}
        return {**about, "answers": answers}

    def _asks_judge(self, benchmark: Benchmark, reason: str, correct: bool) -> bool:
        """Nothing that was right, not answered or absurdly long is shown to it."""
        return self.judge is not None and benchmark.kind == "mathematics" and not correct and reason not in ("no_answer", "too_long")


def summary(benchmark: Benchmark, records: Sequence[Mapping[str, Any]], seconds: float, log: Path) -> Result:
    """The result of a task's records."""
    answers = [answer for record in records for answer in record["answers"]]
    tokens = [answer["tokens"] for answer in answers if answer["tokens"] is not None]
    reasons: Counter[str] = Counter()
    for answer in answers:
        unclear = "judge" in answer and answer["judge"] is None
        reasons["judge" if answer.get("judge") else "judge unclear" if unclear else answer["reason"]] += 1
    return Result(
        benchmark,
        score([[answer["correct"] or answer.get("judge") is True for answer in record["answers"]] for record in records]),
        score([[answer["correct"] for answer in record["answers"]] for record in records]),
        dict(reasons.most_common()),
        sum(answer["finish"] == "length" for answer in answers) / len(answers),
        sum(answer["extracted"] is None for answer in answers) / len(answers),
        sum(tokens) / len(tokens) if tokens else None,
        seconds,
        log,
    )

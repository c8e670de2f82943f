"""How much context the model has that is evaluated, and which stored answers were decided by one that was smaller.

A question that did not fit and an answer that ended where the context did say little of the model, so each is noted with the
context that it was asked in. Where there is more of it now, they are not done:

    a question that did not fit         asked again: whether it fits is no matter of chance
    an answer that was cut, greedy      asked again: the others would come out the same
    an answer that was cut, sampled     the log is refused: to draw again only what was cut would favour short answers

Where the context is not known, or was not, nothing is done again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_spice.config.schema import RolloutConfig
from megatron_spice.evaluation.log import TaskLog
from megatron_spice.evaluation.tasks import Benchmark

TOO_LONG = "question_too_long"
"""The reason of what a question got that does not fit."""
KEY = "context"
"""Of an answer that the context has decided: how many tokens it had, None where that was not known."""


def context_of(folder: Path, engine: RolloutConfig, on_cpu: bool) -> int | None:
    """Tokens of the longest prompt and answer that an engine with a Hugging Face folder has room for; None if that is not said."""
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings") if path.is_file() else None
    context = engine.context_length or said
    return min(context, engine.max_total_tokens) if context and on_cpu else context


def drop_outgrown(benchmark: Benchmark, log: TaskLog, context: int | None) -> list[str]:
    """Takes from a log's `done` what is to be asked again with this context; returns its ids.

    Raises:
        ValueError: sampled answers were cut by a smaller one.
    """
    if context is None:
        return []
    outgrown = {name: found for name, record in log.done.items() if (found := _outgrown(record, context))}
    cut = [name for name, found in outgrown.items() if any(each["reason"] != TOO_LONG for each in found)]
    if cut and benchmark.temperature > 0:
        before = max(each[KEY] for each in outgrown[cut[0]])
        raise ValueError(
            f"{log.path}: answers to {len(cut)} questions were cut where the model's context ended, at {before} tokens, and it has "
            f"{context} now; sampled answers of both are not mixed: give another --output, or remove it"
        )
    for name in outgrown:
        del log.done[name]
    return list(outgrown)


def _outgrown(record: dict[str, Any], context: int) -> list[dict[str, Any]]:
    return [answer for answer in record["answers"] if (answer.get(KEY) or context) < context]

"""The work of playing on one engine: prompts are computed, completions decoded step by step.

A batch of completions takes as many steps as its longest has tokens. In each step the engine reads all its weights and the keys
and values of what has been written, and pays for each sequence that is not over:
    engine_matmul    2 x weights x prompt tokens, each prompt once (its samples share it), and its attention
    engine_memory    steps x bytes of the weights
    engine_cache     bytes of keys and values: of the tokens in front of each token decoded
    engine_step, engine_sequence, engine_request    what each costs besides
Where more sequences are asked for than fit (`max_running_requests`, the KV cache, which has a prompt once for its samples), they
are decoded in waves: so many times the steps. Challenger and Reasoner of a passage follow each other; passages that are in flight
share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.cost.device import Work, added
from megatron_spice.policy.packing import Cost
from megatron_spice.policy.parameter_count import engine_parameters


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests decoded together: `requests` prompts of `prompt` tokens, and how many tokens each completion has."""

    requests: int
    prompt: float
    lengths: Sequence[float]


@dataclass(frozen=True, slots=True)
class EngineShape:
    """An engine: ranks, sequences that it decodes at a time, bytes of a weight and of a number in its KV cache."""

    ranks: int = 1
    most_sequences: int = 256
    kv_tokens: float = math.inf
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0

    def fitting(self, batch: Batch) -> float:
        """How many sequences like these are decoded at a time."""
        count = max(1, len(batch.lengths))
        tokens = (batch.prompt * batch.requests + sum(batch.lengths)) / count
        return min(self.most_sequences, max(1.0, self.kv_tokens / max(1.0, tokens)))


def batch_work(architecture: ModelArchitecture, engine: EngineShape, batch: Batch) -> Work:
    """One batch on each of the engine's ranks."""
    a, cost = architecture, Cost.of(architecture)
    tokens, longest = sum(batch.lengths), max(batch.lengths, default=0.0)
    mean = tokens / max(1, len(batch.lengths))
    waves = max(1.0, len(batch.lengths) / engine.fitting(batch))
    steps = longest + (waves - 1.0) * mean
    weights = engine_parameters(a, engine.ranks) * engine.weight_bytes
    keys = 2.0 * a.num_layers * a.num_query_groups * a.head_dim / engine.ranks * engine.cache_bytes
    contexts = sum(length * (batch.prompt + length / 2.0) for length in batch.lengths)
    prompts = batch.requests * batch.prompt
    return {
        "engine_matmul": (cost.token * prompts + cost.pair * prompts * batch.prompt / 2.0 + cost.prediction * batch.requests) / engine.ranks,
        "engine_memory": steps * weights, "engine_cache": contexts * keys,
        "engine_step": steps, "engine_sequence": tokens, "engine_request": float(batch.requests),
    }  # fmt: skip


def play_work(architecture: ModelArchitecture, engine: EngineShape, batches: Sequence[Batch]) -> Work:
    """Batches one after the other."""
    return added(*(batch_work(architecture, engine, batch) for batch in batches))

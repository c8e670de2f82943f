"""Choosing who is trained on: the Challenger's group of G, the Reasoner's task, and advantages within a group.

The group keeps the ratio of valid to invalid attempts [paper Algorithm 1 line 6], because both learn from each other
through the common mean: only valid ones would teach no format, a best-of pick would bias the curriculum.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def valid_count(valid: int, invalid: int, size: int) -> int:
    """How many of a group of `size` are valid: the ratio rounded half up, at least one of each kind that exists.

    Where only one place is left for two kinds, the valid one gets it: without it the passage has no task.
    """
    total = valid + invalid
    if total <= size:
        return valid
    count = (2 * size * valid + total) // (2 * total)
    if invalid:
        count = min(count, size - 1)
    return max(count, 1) if valid else 0


def subsample(validity: Sequence[bool], size: int, rng: random.Random) -> list[int]:
    """Indices (rising) of the attempts that form the group: all of them up to `size`, else a ratio-preserving
    sample."""
    valid = [index for index, is_valid in enumerate(validity) if is_valid]
    invalid = [index for index, is_valid in enumerate(validity) if not is_valid]
    if len(validity) <= size:
        return list(range(len(validity)))
    count = valid_count(len(valid), len(invalid), size)
    return sorted(rng.sample(valid, count) + rng.sample(invalid, size - count))


def advantages(rewards: Sequence[float]) -> list[float]:
    """`rewards` less their mean, without division by the deviation [paper Eq. 3, 4: DrGRPO]; equal rewards give exact
    zeros."""
    if not rewards or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]

"""Numbers of all ranks in an iteration's metrics: the mean, the extremes, and whose they are, by two reductions of a few numbers.

Reductions pass along the ranks, so no rank hears from all others, whatever their number. Whose the largest is comes by the same
reduction: the number's bits, which as integers are in the numbers' order, give their last ones to the rank. That costs a number
all but ten of its digits, and no message more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PHASES = ("seconds/sync", "seconds/play", "seconds/wake", "seconds/train", "seconds/save")
MEMORY = (
    "memory/slept_gib", "memory/sleep_seconds", "memory/free_for_weights_gib", "memory/slept_weights_gib",
    "memory/sleep_weights_seconds", "memory/free_for_kv_cache_gib", "memory/free_for_policy_gib", "memory/wake_seconds",
    "memory/most_held_gib", "memory/free_on_host_gib",
)  # fmt: skip
SYNC = ("sync/push_seconds", "sync/gib_per_second", "sync/times_a_copy")
SPREAD = (*PHASES, *MEMORY, *SYNC)
"""What is looked at on every rank. The first rank's own are in the metrics under these names."""

EXTREMES = ("min", "max")
_RANK_BITS = 20
_RANKS = (1 << _RANK_BITS) - 1  # more than a run has
_NONE = -(1 << 63)
_MAGNITUDE = (1 << 63) - 1


def spread(values: Mapping[str, float], names: Sequence[str] = SPREAD) -> dict[str, float]:
    """`ranks/<name>_mean`, `_min`, `_max`, `_min_rank` and `_max_rank` over all ranks that have the value, of several the lowest
    rank; nothing of what no rank has. A collective, `names` the same on each."""
    import torch
    import torch.distributed as dist

    has = torch.tensor([name in values for name in names])
    mine = torch.tensor([float(values.get(name, 0.0)) for name in names], dtype=torch.float64)
    total = torch.cat([mine, has.double()])
    order, rank = _in_order(mine), dist.get_rank()
    most = torch.cat([_marked(order, has, rank), _marked(-order, has, rank)])
    dist.all_reduce(total)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    sums, counts = total.chunk(2)
    largest, smallest = most.chunk(2)
    highest, lowest = _number(largest & ~_RANKS), _number(-(smallest & ~_RANKS))
    found: dict[str, float] = {}
    for place, name in enumerate(names):
        if not (count := counts[place].item()):
            continue
        short = f"ranks/{name.removeprefix('seconds/')}"
        found |= {
            f"{short}_mean": sums[place].item() / count, f"{short}_min": lowest[place].item(), f"{short}_max": highest[place].item(),
            f"{short}_min_rank": _rank(smallest[place]), f"{short}_max_rank": _rank(largest[place]),
        }  # fmt: skip
    return found


def _in_order(numbers: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the numbers (float64), without the bits that the rank takes."""
    import torch

    bits = numbers.view(torch.int64)
    order = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (order + (1 << _RANK_BITS - 1)) & ~_RANKS


def _number(order: torch.Tensor) -> torch.Tensor:
    """The numbers of such integers."""
    import torch

    return torch.where(order < 0, order ^ _MAGNITUDE, order).view(torch.float64)


def _marked(order: torch.Tensor, has: torch.Tensor, rank: int) -> torch.Tensor:
    """With the rank, a lower one before a higher; what is not there comes after all else."""
    import torch

    return torch.where(has, order | (_RANKS - rank), torch.full_like(order, _NONE))


def _rank(marked: torch.Tensor) -> float:
    return float(_RANKS - (marked.item() & _RANKS))

"""Numbers of all ranks in an iteration's metrics: the mean and the extremes, by two reductions of a few numbers.

Reductions pass along the ranks, so no rank hears from all others, whatever their number; which rank was slow is in that
rank's own seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def spread(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """`ranks/<name>_mean` and `ranks/<name>_max` over all ranks; a collective, `names` the same on each. A missing value is 0."""
    import torch
    import torch.distributed as dist

    mine = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64)
    total, most = mine.clone(), mine.clone()
    dist.all_reduce(total)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    means = (total / dist.get_world_size()).tolist()
    found: dict[str, float] = {}
    for name, mean, largest in zip(names, means, most.tolist()):
        short = name.removeprefix("seconds/")
        found |= {f"ranks/{short}_mean": mean, f"ranks/{short}_max": largest}
    return found

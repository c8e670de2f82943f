"""Who sends a bucket to whom, where not every rank hosts an engine. Plain Python, the same on all ranks.

Only hosts receive. A host takes a bucket from one *team* that has it: the tensor-parallel group whose ranks hold slices of it,
or for an expert, which is not sliced, the one rank that holds it. Of the teams that have it it takes its own, else one of
its node, else any; among equals hosts are dealt out in turn, so that no team serves all of them.

Nothing is passed on by a rank that does not need it. That a team serves several hosts one by one costs no more than each
host's share of a broadcast, as long as the owners of different buckets take turns, which they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


Route = Mapping[int, tuple[int, ...]]
"""For each host the ranks that send it a bucket, in order of their slices."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank stands among all, and whether it hosts an engine. `team` is its tensor-parallel group, in order."""

    rank: int
    node: int
    stage: int
    expert_rank: int
    team: tuple[int, ...]
    is_host: bool


def plan_route(seats: Sequence[Seat], stage: int, expert_rank: int | None) -> Route:
    """The route of what `stage` has, or only expert rank `expert_rank` of it if that is not None. A host may be in its own team."""
    having = [seat for seat in seats if seat.stage == stage and expert_rank in (None, seat.expert_rank)]
    of_node = {seat.rank: seat.node for seat in seats}
    teams = sorted({(seat.rank,) if expert_rank is not None else seat.team for seat in having})
    found = {}
    for turn, host in enumerate(seat for seat in seats if seat.is_host):
        own = [team for team in teams if host.rank in team]
        near = [team for team in teams if of_node[team[0]] == host.node]
        choice = own or near or teams
        found[host.rank] = choice[turn % len(choice)]
    return found

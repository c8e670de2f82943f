"""Which ranks send a bucket to a host: such as have it, near ones first, and not always the same."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.weights.routes import Seat, plan_route


@st.composite
def seatings(draw):
    """Ranks as Megatron orders them: tensor-parallel neighbours, then data, then pipeline; experts over the ranks of a stage."""
    tensor, data, pipeline = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    per_stage = tensor * data
    expert = draw(st.sampled_from([size for size in (1, 2, 4) if per_stage % size == 0]))
    world = per_stage * pipeline
    per_node = draw(st.sampled_from([size for size in (1, 2, 4, 8) if world % size == 0]))
    hosts = draw(st.sets(st.integers(0, world - 1), min_size=1))
    return [
        Seat(
            rank, rank // per_node, rank // per_stage, rank % per_stage % expert,
            tuple(range(rank // tensor * tensor, rank // tensor * tensor + tensor)), rank in hosts,
        )
        for rank in range(world)
    ]  # fmt: skip


@given(seatings(), st.booleans())
def test_hosts_and_only_they_get_a_bucket_from_who_has_it(seats, of_an_expert):
    for stage in {seat.stage for seat in seats}:
        for expert_rank in {seat.expert_rank for seat in seats} if of_an_expert else [None]:
            route = plan_route(seats, stage, expert_rank)
            assert list(route) == [seat.rank for seat in seats if seat.is_host]
            for host, team in route.items():
                having = [seats[rank] for rank in team]
                assert all(seat.stage == stage and expert_rank in (None, seat.expert_rank) for seat in having)
                assert team == (having[0].team if expert_rank is None else (having[0].rank,))
                had = seats[host].stage == stage and expert_rank in (None, seats[host].expert_rank)
                assert not had or host in team, "it asks others for what it has"
                near = any(s.stage == stage and expert_rank in (None, s.expert_rank) and s.node == seats[host].node for s in seats)
                assert not near or had or seats[host].node in {seats[rank].node for rank in team}


def test_hosts_take_turns():
    """One stage of 4 replicas on another node than 4 hosts: each replica serves one."""
    seats = [Seat(rank, rank // 4, rank // 4, 0, (rank,), rank >= 4) for rank in range(8)]
    assert Counter(plan_route(seats, 0, None).values()) == {(0,): 1, (1,): 1, (2,): 1, (3,): 1}

"""Laws of the packing plan."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.records import Trajectory
from megatron_spice.policy.packing import (
    Cost,
    deal_rows,
    make_blocks,
    num_tokens,
    num_unshared_tokens,
    pack_rows,
    plan_rows,
    row_cost,
    split_steps,
)

prompts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple), min_size=1, max_size=4, unique=True)


@st.composite
def batches(draw: st.DrawFn) -> list[Trajectory]:
    found = []
    for prompt in draw(prompts):
        for length in draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)):
            completion = (len(found),) * length
            found.append(Trajectory("reasoner", prompt, completion, (0.0,) * length, 1.0, reward=len(found)))
    return found


@given(batches(), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(1, 3))
def test_every_trajectory_is_planned_once_on_equally_many_rows(batch, budget, ranks, shared, multiple):
    plan = plan_rows(batch, budget, ranks, shared_prefix=shared, multiple=multiple)
    [count] = {len(rows) for rows in plan}
    assert len(plan) == ranks and count % multiple == 0
    blocks = [block for rows in plan for row in rows for block in row]
    assert Counter(t for block in blocks for t in block.trajectories) == Counter(batch)
    assert all(t.prompt_ids == block.prompt_ids for block in blocks for t in block.trajectories)
    for row in (row for rows in plan for row in rows):
        alone = len(row) == 1 and len(row[0].trajectories) == 1
        assert num_tokens(row) <= budget or alone


@given(batches(), st.integers(1, 40), st.booleans())
def test_rows_are_dense(batch, budget, shared):
    """First fit: no block of a row has room in an earlier one, so no two rows could be one within the budget."""
    blocks = make_blocks(batch, budget, shared)
    rows = pack_rows(blocks, budget)
    assert Counter(block for row in rows for block in row) == Counter(blocks) and all(rows)
    for index, row in enumerate(rows):
        for earlier in map(num_tokens, rows[:index]):
            assert earlier + num_tokens(row) > budget
            assert all(earlier + block.num_tokens > budget for block in row)


costs = st.builds(Cost, st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 10))


@given(batches(), st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), costs)
def test_no_rank_is_far_above_the_mean(batch, budget, ranks, multiple, cost):
    """The classic bound of dealing the costliest first to the least loaded, and the reason for it: with all of a rank's rows
    but its cheapest, which came last, no other rank had less than that one. Dealing in turn keeps the bound but not the
    reason."""
    rows = pack_rows(make_blocks(batch, budget, shared_prefix=True), budget)
    plan = deal_rows(rows, ranks, cost, multiple)
    assert Counter(row for share in plan for row in share if row) == Counter(rows)
    shares = [[row_cost(row, cost) for row in share if row] for share in plan]
    loads = [sum(share) for share in shares]
    largest = max(row_cost(row, cost) for row in rows)
    assert max(loads) <= (sum(loads) / ranks + largest * (1 - 1 / ranks)) * (1 + 1e-9)
    for share, load in zip(shares, loads):
        assert load - min(share, default=0) <= min(loads) + 1e-9 * max(loads)


@given(batches(), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_run_as_many_rows_and_no_more_than_needed(batch, budget, ranks, multiple):
    """Equally many, a multiple; empty ones come last, and fewer than a multiple on the rank that has most."""
    plan = plan_rows(batch, budget, ranks, multiple=multiple)
    [count] = {len(share) for share in plan}
    filled = [sum(map(bool, share)) for share in plan]
    assert count % multiple == 0 and 0 <= count - max(filled) < multiple
    assert all(all(share[:number]) and not any(share[number:]) for share, number in zip(plan, filled))


@given(batches(), st.integers(1, 40))
def test_sharing_never_costs_tokens(batch, budget):
    shared = [(block,) for block in make_blocks(batch, budget, shared_prefix=True)]
    assert sum(map(num_tokens, shared)) <= sum(map(num_unshared_tokens, shared))
    whole = make_blocks(batch, 10**9, shared_prefix=True)
    assert len(whole) == len({t.prompt_ids for t in batch})


@given(batches(), st.integers(1, 6))
def test_steps_split_whole_groups(batch, steps):
    parts = split_steps(batch, steps)
    assert Counter(t for part in parts for t in part) == Counter(batch)
    assert 1 <= len(parts) <= steps and all(parts)
    for prompt in {t.prompt_ids for t in batch}:
        assert sum(any(t.prompt_ids == prompt for t in part) for part in parts) == 1


def test_every_step_has_both_roles():
    batch = [
        Trajectory(role, (number, index), (1,), (0.0,), 1.0, 0.0)
        for number in range(4) for index, role in enumerate(("challenger", "reasoner"))
    ]  # fmt: skip
    assert [{t.role for t in part} for part in split_steps(batch, 2)] == [{"challenger", "reasoner"}] * 2


@given(batches(), st.integers(5, 40))
def test_cost_counts_tokens_pairs_and_predictions(batch, budget):
    for row in plan_rows(batch, budget, 1)[0]:
        pairs = 0
        for block in row:
            for place in range(len(block.prompt_ids)):
                pairs += place + 1
            for trajectory in block.trajectories:
                pairs += sum(len(block.prompt_ids) + place + 1 for place in range(len(trajectory.completion_ids)))
        predictions = sum(len(t.completion_ids) for block in row for t in block.trajectories)
        assert row_cost(row, Cost(1.0, 0.01, 0.5)) == pytest.approx(num_tokens(row) + 0.01 * pairs + 0.5 * predictions)


def test_a_long_sequence_costs_more_than_as_many_tokens_in_short_ones():
    lengths = [90, 31, 29, 29]
    batch = [Trajectory("reasoner", (i,), (1,) * length, (0.0,) * length, 1.0, 0.0) for i, length in enumerate(lengths)]
    plan = plan_rows(batch, 1, 2, cost=Cost(1.0, 1.0))
    assert [len([row for row in rows if row]) for rows in plan] == [1, 3]


def test_rows_are_balanced_by_cost():
    batch = [Trajectory("reasoner", (i,), (1,) * length, (0.0,) * length, 1.0, 0.0) for i, length in enumerate([9, 1, 5, 5])]
    loads = [sum(map(num_tokens, rows)) for rows in plan_rows(batch, 1, 2)]
    assert loads == [12, 12]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 8))
def test_several_ranks_have_as_many_micro_batches_as_full_rows_would_give(lengths, ranks):
    trajectories = [Trajectory("reasoner", (number,), (0,) * length, (), 1.0, 0.0) for number, length in enumerate(lengths)]
    budget = 100
    plan = plan_rows(trajectories, budget, ranks)
    full = deal_rows(pack_rows(make_blocks(trajectories, budget, True), budget), ranks)
    assert len(plan[0]) == len(full[0]) and all(num_tokens(row) <= budget for share in plan for row in share)
    played = [each.prompt_ids[0] for share in plan for row in share for block in row for each in block.trajectories]
    assert sorted(played) == list(range(len(lengths)))


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_no_rank_waits_long_for_another(ranks):
    """Four passages a rank, in rows that a rank has two or three of: dealt full, the busiest has a quarter more than the mean."""
    rng = random.Random(0)
    trajectories = [
        Trajectory("challenger", (number,) * prompt, (0,) * rng.randint(1, longest), (), 1.0, 0.0)
        for number in range(8 * ranks) for prompt, longest in [((150, 64), (100, 16))[number % 2]] for _ in range(8)
    ]  # fmt: skip

    def worst(plan):
        loads = [sum(map(num_tokens, share)) for share in plan]
        return max(loads) / (sum(loads) / len(loads))

    full = deal_rows(pack_rows(make_blocks(trajectories, 1024, True), 1024), ranks)
    assert worst(plan_rows(trajectories, 1024, ranks)) < 1.1 < worst(full)

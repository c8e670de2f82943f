"""Packing trajectories into rows, in plain Python.

A row is what one micro-batch computes. Trajectories with the same prompt stand behind one copy of it,

    [ prompt | completion_0 | ... | completion_k | next prompt | ... ]

so that a group's prompt, thousands of tokens in SPICE, is computed once: exact, because a token attends only to its own
prompt and to its own completion (`rows.py` makes the mask and the positions). With sharing off, every trajectory brings
its own prompt; nothing else changes.

Rows hold at most a budget of tokens; a block longer than the budget is split between completions, and a single
trajectory longer than the budget gets a row to itself. Rows are dealt to the data-parallel ranks by descending cost,
each to the least loaded, and short ranks get empty rows: every rank must run the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spice.game.records import Trajectory


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt and the trajectories behind it."""

    prompt_ids: tuple[int, ...]
    trajectories: tuple[Trajectory, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(trajectory.completion_ids) for trajectory in self.trajectories)


Row = tuple[Block, ...]


def num_tokens(row: Row) -> int:
    """Tokens that computing the row takes."""
    return sum(block.num_tokens for block in row)


def num_unshared_tokens(row: Row) -> int:
    """Tokens the same trajectories would take with a prompt each."""
    return sum(len(block.prompt_ids) + len(t.completion_ids) for block in row for t in block.trajectories)


def make_blocks(trajectories: Sequence[Trajectory], budget: int, shared_prefix: bool) -> list[Block]:
    """Groups trajectories by prompt, in order of appearance, and splits groups over the budget between completions."""
    if not shared_prefix:
        return [Block(trajectory.prompt_ids, (trajectory,)) for trajectory in trajectories]
    groups: dict[tuple[int, ...], list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.prompt_ids, []).append(trajectory)
    blocks = []
    for prompt_ids, group in groups.items():
        held: list[Trajectory] = []
        size = len(prompt_ids)
        for trajectory in group:
            length = len(trajectory.completion_ids)
            if held and size + length > budget:
                blocks.append(Block(prompt_ids, tuple(held)))
                held, size = [], len(prompt_ids)
            held.append(trajectory)
            size += length
        blocks.append(Block(prompt_ids, tuple(held)))
    return blocks


def pack_rows(blocks: Sequence[Block], budget: int) -> list[Row]:
    """First-fit decreasing: the longest block first, each into the first row with room for it."""
    rows: list[list[Block]] = []
    sizes: list[int] = []
    for block in sorted(blocks, key=lambda block: -block.num_tokens):
        for index, size in enumerate(sizes):
            if size + block.num_tokens <= budget:
                rows[index].append(block)
                sizes[index] += block.num_tokens
                break
        else:
            rows.append([block])
            sizes.append(block.num_tokens)
    return [tuple(row) for row in rows]


def deal_rows(rows: Sequence[Row], data_parallel_size: int) -> list[list[Row]]:
    """One list of rows for each data-parallel rank, equally long; `()` stands for an empty row."""
    dealt: list[list[Row]] = [[] for _ in range(data_parallel_size)]
    loads = [0] * data_parallel_size
    for row in sorted(rows, key=num_tokens, reverse=True):
        rank = min(range(data_parallel_size), key=lambda rank: (loads[rank], rank))
        dealt[rank].append(row)
        loads[rank] += num_tokens(row)
    longest = max((len(share) for share in dealt), default=0)
    for share in dealt:
        share.extend([()] * (longest - len(share)))
    return dealt


def plan_rows(
    trajectories: Sequence[Trajectory], budget: int, data_parallel_size: int, shared_prefix: bool = True
) -> list[list[Row]]:
    """Rows for each data-parallel rank: `plan[rank][micro_batch]`."""
    return deal_rows(pack_rows(make_blocks(trajectories, budget, shared_prefix), budget), data_parallel_size)


def split_steps(trajectories: Sequence[Trajectory], steps: int) -> list[list[Trajectory]]:
    """Splits an iteration's trajectories into `steps` parts of whole prompt groups, each role spread over all of them.

    Groups are dealt in turn, one role after the other, so that no step belongs to one role alone; with fewer groups than
    steps there are fewer parts.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault((trajectory.role, trajectory.prompt_ids), []).append(trajectory)
    parts: list[list[Trajectory]] = [[] for _ in range(steps)]
    for turn, key in enumerate(sorted(groups, key=lambda key: key[0])):  # stable: in order of appearance within a role
        parts[turn % steps].extend(groups[key])
    return [part for part in parts if part]

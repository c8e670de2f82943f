"""Packing trajectories into rows, in plain Python.

A row is what one micro-batch computes. Trajectories with the same prompt stand behind one copy of it,

    [ prompt | completion_0 | ... | completion_k | next prompt | ... ]

so that a group's prompt, thousands of tokens in SPICE, is computed once: exact, because a token attends only to its own
prompt and to its own completion (`rows.py` makes the mask and the positions). With sharing off, every trajectory brings
its own prompt; nothing else changes.

Rows hold at most a budget of tokens; a block longer than the budget is split between completions, and a single
trajectory longer than the budget gets a row to itself. For several data-parallel ranks there are as many rows for each, about
equally costly (`even_rows`), if that can be. Rows are dealt to the data-parallel ranks by descending cost,
each to the least loaded, and short ranks get empty rows: every rank must run the same number of micro-batches, and an
interleaved pipeline a multiple of its stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.game.records import Trajectory


@dataclass(frozen=True, slots=True)
class Cost:
    """Forward floating-point operations: of a token in the layers, of a pair of tokens that attend, of a prediction."""

    token: float = 1.0
    pair: float = 0.0
    prediction: float = 0.0

    @classmethod
    def of(cls, architecture: ModelArchitecture) -> Cost:
        """Two operations a weight and token, four a head dimension and pair; norms and activations do not count."""
        a = architecture
        heads = a.num_attention_heads * a.head_dim
        projections = a.hidden_size * (2 * heads + 2 * a.num_query_groups * a.head_dim)
        experts = a.experts_per_token * a.expert_ffn_hidden_size if a.num_experts else a.ffn_hidden_size
        return cls(
            token=2.0 * a.num_layers * (projections + 3 * a.hidden_size * experts),
            pair=4.0 * a.num_layers * heads,
            prediction=2.0 * a.hidden_size * a.vocab_size,
        )


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


def row_cost(row: Row, cost: Cost) -> float:
    """What computing the row costs; every completion token is predicted and attends to its prompt and to what precedes it."""
    total = cost.token * num_tokens(row)
    for block in row:
        prompt = len(block.prompt_ids)
        lengths = [len(trajectory.completion_ids) for trajectory in block.trajectories]
        pairs = prompt * (prompt + 1) / 2 + sum(length * (prompt + (length + 1) / 2) for length in lengths)
        total += cost.pair * pairs + cost.prediction * sum(lengths)
    return total


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
    for block, length in sorted(((block, block.num_tokens) for block in blocks), key=lambda sized: -sized[1]):
        for index, size in enumerate(sizes):
            if size + length <= budget:
                rows[index].append(block)
                sizes[index] += length
                break
        else:
            rows.append([block])
            sizes.append(length)
    return [tuple(row) for row in rows]


def even_rows(blocks: Sequence[Block], budget: int, count: int, cost: Cost = Cost()) -> list[Row] | None:
    """The blocks in so many rows that cost about the same: the costliest first, each into the cheapest row with room for it. None
    if one finds no room, or there are fewer blocks than rows.

    Full rows, dealt to ranks that get two or three each, leave most of them waiting for those with three; as many rows for
    each rank, none of them full, do not.
    """
    if len(blocks) < count:
        return None
    rows: list[list[Block]] = [[] for _ in range(count)]
    sizes, loads = [0] * count, [0.0] * count
    for block, price in sorted(((block, row_cost((block,), cost)) for block in blocks), key=lambda priced: -priced[1]):
        length = block.num_tokens
        places = [place for place in range(count) if not rows[place] or sizes[place] + length <= budget]
        if not places:
            return None
        place = min(places, key=lambda place: (loads[place], place))
        rows[place].append(block)
        sizes[place] += length
        loads[place] += price
    return [tuple(row) for row in rows]


def deal_rows(rows: Sequence[Row], data_parallel_size: int, cost: Cost = Cost(), multiple: int = 1) -> list[list[Row]]:
    """One list of rows for each data-parallel rank, equally long, a multiple of `multiple`; `()` is an empty row."""
    dealt: list[list[Row]] = [[] for _ in range(data_parallel_size)]
    loads = [0.0] * data_parallel_size
    for row, its_cost in sorted(((row, row_cost(row, cost)) for row in rows), key=lambda priced: priced[1], reverse=True):
        rank = min(range(data_parallel_size), key=lambda rank: (loads[rank], rank))
        dealt[rank].append(row)
        loads[rank] += its_cost
    longest = max((len(share) for share in dealt), default=0)
    for share in dealt:
        share.extend([()] * (-(-longest // multiple) * multiple - len(share)))
    return dealt


def plan_rows(
    trajectories: Sequence[Trajectory],
    budget: int,
    data_parallel_size: int,
    shared_prefix: bool = True,
    cost: Cost = Cost(),
    multiple: int = 1,
) -> list[list[Row]]:
    """Rows for each data-parallel rank: `plan[rank][micro_batch]`."""
    blocks = make_blocks(trajectories, budget, shared_prefix)
    rows = pack_rows(blocks, budget)
    if data_parallel_size > 1:
        rows = even_rows(blocks, budget, -(-len(rows) // data_parallel_size) * data_parallel_size, cost) or rows
    return deal_rows(rows, data_parallel_size, cost, multiple)


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

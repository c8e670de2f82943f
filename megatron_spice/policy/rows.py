"""From a packed row to the tensors a forward pass needs.

Shape suffixes: k tokens of the whole row, s tokens of it on this rank (all of them without context parallelism), c
completion tokens that this rank predicts.

The position of a completion's first token is the length of its prompt, whatever stands between them in the row; the
log-probability of that token is read at the prompt's last position, once for each completion that shares the prompt.

Who attends to whom is not written down as a mask of k x k but as three numbers a token, from which the attention makes
what it needs. Context parallelism cuts a row into 2 x context pieces and gives rank r pieces r and 2 context - 1 - r: an
early piece, whose tokens see little, and a late one, whose tokens see much. The codes stand in the order in which the
ranks' pieces are gathered, so that a rank's own tokens are one slice of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_spice.policy.packing import Row


@dataclass(slots=True)
class RowTensors:
    """One rank's part of a row, on a device.

    Attributes:
        ids_s: token ids.
        positions_s: position of each token in its own sequence.
        codes_k3: who each token of the whole row is: its prompt's number (unique and negative for padding, which sees only
            itself), its completion's number (-1 in a prompt), its place in the row. A token attends to those of its prompt
            that are its own completion's or the prompt's, at its own place or before.
        lengths: of the row's sequences in order of place, padding at the end as one; only where nothing is shared.
        source_c: which of this rank's tokens predicts.
        labels_c: the completion tokens.
        place_c: where the completion token stands among all of the row, in order of sequence.
        advantages_c, rollout_logprobs_c: float32, of each completion token.
        weights_c: float32, the factor of a completion token in the loss.
        sequence_c: which of the row's trajectories a completion token belongs to.
        is_challenger_c: the token was written by the Challenger.
        is_stale_c: the token was sampled under older weights than those at hand.
        old_logprobs_c: the policy's log-probs before the iteration's first step; None with a single step.
        reference_logprobs_c: those of the weights the run began with; None where nothing is compared with them.
    """

    ids_s: torch.Tensor
    positions_s: torch.Tensor
    codes_k3: torch.Tensor
    lengths: tuple[int, ...] | None
    source_c: torch.Tensor
    labels_c: torch.Tensor
    place_c: torch.Tensor
    advantages_c: torch.Tensor
    rollout_logprobs_c: torch.Tensor
    weights_c: torch.Tensor
    sequence_c: torch.Tensor
    is_challenger_c: torch.Tensor
    is_stale_c: torch.Tensor
    old_logprobs_c: torch.Tensor | None = None
    reference_logprobs_c: torch.Tensor | None = None


def padded_length(num_tokens: int, multiple: int) -> int:
    """The length of a row of `num_tokens` tokens; an empty one has tokens too, which count for nothing."""
    return -(-max(1, num_tokens) // multiple) * multiple


def gathered_order(length: int, context_size: int) -> torch.Tensor:
    """Places of the row [length] in the order in which context-parallel ranks hold them, rank after rank."""
    if context_size == 1:
        return torch.arange(length)
    pieces = torch.arange(length).chunk(2 * context_size)
    return torch.cat([torch.cat((pieces[rank], pieces[-1 - rank])) for rank in range(context_size)])


def row_tensors(
    row: Row, device: torch.device | str, length: int | None = None, context_rank: int = 0, context_size: int = 1
) -> RowTensors:
    """Lays a row out.

    Args:
        length: pad the row to so many tokens; a multiple of 2 x context_size if that is above 1.
    """
    tokens, predictions = _lay_out(row)
    ids, positions, prompts, leaves = tokens
    padding = padded_length(len(ids), 1) - len(ids) if length is None else length - len(ids)
    assert padding >= 0, f"a row of {len(ids)} tokens does not fit {length}"
    shared = any(len(block.trajectories) > 1 for block in row)
    lengths = tuple(block.num_tokens for block in row) + ((padding,) if padding else ())
    ids += [0] * padding
    positions += range(padding)
    prompts += range(-1, -1 - padding, -1)
    leaves += [-1] * padding

    order = gathered_order(len(ids), context_size)
    mine = order.chunk(context_size)[context_rank]
    local = torch.full((len(ids),), -1, dtype=torch.long)
    local[mine] = torch.arange(len(mine))
    source, labels, advantages, rollout, weights, sequence, challenger, stale = predictions
    source_c = local[torch.tensor(source, dtype=torch.long)]
    here = (source_c >= 0).nonzero()[:, 0]

    def chosen(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[here].to(device)

    codes = torch.stack([torch.tensor(prompts), torch.tensor(leaves), torch.arange(len(ids))], dim=1)
    return RowTensors(
        ids_s=torch.tensor(ids)[mine].to(device),
        positions_s=torch.tensor(positions)[mine].to(device),
        codes_k3=codes[order].to(device),
        lengths=None if shared else lengths,
        source_c=source_c[here].to(device),
        labels_c=chosen(labels, torch.long),
        place_c=here.to(device),
        advantages_c=chosen(advantages, torch.float32),
        rollout_logprobs_c=chosen(rollout, torch.float32),
        weights_c=chosen(weights, torch.float32),
        sequence_c=chosen(sequence, torch.long),
        is_challenger_c=chosen(challenger, torch.bool),
        is_stale_c=chosen(stale, torch.bool),
    )


def _lay_out(row: Row) -> tuple[tuple[list[int], ...], tuple[list, ...]]:
    """The row's tokens (id, position, prompt number, completion number) and its predictions, as lists."""
    ids: list[int] = []
    positions: list[int] = []
    prompts: list[int] = []
    leaves: list[int] = []
    source: list[int] = []
    labels: list[int] = []
    advantages: list[float] = []
    rollout: list[float] = []
    weights: list[float] = []
    sequence: list[int] = []
    challenger: list[bool] = []
    stale: list[bool] = []
    leaf = 0
    for number, block in enumerate(row):
        length = len(block.prompt_ids)
        ids += block.prompt_ids
        positions += range(length)
        prompts += [number] * length
        leaves += [-1] * length
        last_of_prompt = len(ids) - 1
        for trajectory in block.trajectories:
            count = len(trajectory.completion_ids)
            if count:
                source += [last_of_prompt, *range(len(ids), len(ids) + count - 1)]
            ids += trajectory.completion_ids
            positions += range(length, length + count)
            prompts += [number] * count
            leaves += [leaf] * count
            labels += trajectory.completion_ids
            advantages += [trajectory.advantage] * count
            rollout += trajectory.logprobs
            weights += [trajectory.weight] * count
            sequence += [leaf] * count
            challenger += [trajectory.role == "challenger"] * count
            stale += [place < trajectory.num_stale for place in range(count)]
            leaf += 1
    return (ids, positions, prompts, leaves), (source, labels, advantages, rollout, weights, sequence, challenger, stale)

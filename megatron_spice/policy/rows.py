"""From a packed row to the tensors a forward pass needs.

Shape suffixes: s tokens of the row, c completion tokens of the row.

The position of a completion's first token is the length of its prompt, whatever stands between them in the row; the
log-probability of that token is read at the prompt's last position, once for each completion that shares the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_spice.policy.packing import Row


@dataclass(slots=True)
class RowTensors:
    """One row on a device.

    Attributes:
        ids_s: token ids.
        positions_s: position of each token in its own sequence.
        mask_ss: True where the row's token (first axis) attends to the other (second axis).
        source_c: row position at which a completion token is predicted.
        labels_c: the completion tokens.
        advantages_c, rollout_logprobs_c: float32, of each completion token.
        weights_c: float32, the factor of a completion token in the loss.
        sequence_c: which of the row's trajectories a completion token belongs to.
        is_challenger_c: the token was written by the Challenger.
        old_logprobs_c: the policy's log-probs before the iteration's first step; None with a single step.
    """

    ids_s: torch.Tensor
    positions_s: torch.Tensor
    mask_ss: torch.Tensor
    source_c: torch.Tensor
    labels_c: torch.Tensor
    advantages_c: torch.Tensor
    rollout_logprobs_c: torch.Tensor
    weights_c: torch.Tensor
    sequence_c: torch.Tensor
    is_challenger_c: torch.Tensor
    old_logprobs_c: torch.Tensor | None = None


def row_tensors(row: Row, device: torch.device | str) -> RowTensors:
    """Lays a row out. An empty row becomes one token that counts for nothing."""
    ids: list[int] = []
    positions: list[int] = []
    prompts: list[int] = []  # which prompt a token belongs to
    leaves: list[int] = []  # which completion it belongs to, -1 for the prompt itself
    source: list[int] = []
    labels: list[int] = []
    advantages: list[float] = []
    rollout: list[float] = []
    weights: list[float] = []
    sequence: list[int] = []
    challenger: list[bool] = []
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
            leaf += 1
    if not ids:
        ids, positions, prompts, leaves = [0], [0], [0], [-1]

    def tensor(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    prompts_s, leaves_s = tensor(prompts, torch.long), tensor(leaves, torch.long)
    same_prompt = prompts_s[:, None] == prompts_s[None]
    visible = (leaves_s[None] == leaves_s[:, None]) | (leaves_s[None] == -1)
    return RowTensors(
        ids_s=tensor(ids, torch.long),
        positions_s=tensor(positions, torch.long),
        mask_ss=(same_prompt & visible).tril(),
        source_c=tensor(source, torch.long),
        labels_c=tensor(labels, torch.long),
        advantages_c=tensor(advantages, torch.float32),
        rollout_logprobs_c=tensor(rollout, torch.float32),
        weights_c=tensor(weights, torch.float32),
        sequence_c=tensor(sequence, torch.long),
        is_challenger_c=tensor(challenger, torch.bool),
    )

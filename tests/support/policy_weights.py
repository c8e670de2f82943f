"""A policy's weights as tests want them: whole on every rank, and on a disk without a run around them. All ranks call these together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_spice.checkpoint.background import Ranks
from megatron_spice.checkpoint.checkpointer import Trainable
from megatron_spice.checkpoint.distcp import write_file, write_index
from megatron_spice.checkpoint.pieces import Holdings
from megatron_spice.checkpoint.snapshot import Snapshot
from megatron_spice.policy.policy import Policy


def hf_buckets(policy: Policy) -> Iterator[dict[str, torch.Tensor]]:
    """The current weights as whole Hugging Face tensors, bucket by bucket, as they are: `rollout_buckets` of every rank, unrounded."""
    assert policy.weights_awake
    return policy.gatherer.buckets(policy.parameters)


def hf_names(policy: Policy) -> set[str]:
    """The names of all tensors that `hf_buckets` gives."""
    return {name for bucket in policy.gatherer.plan for name in bucket.shapes}


def save_tensors(policy: Trainable, folder: Path, with_optimizer: bool) -> None:
    """Writes the weights, and the optimiser if wanted, into an existing empty folder, as a checkpoint has them."""
    held = policy.holdings(with_optimizer)
    ranks = Ranks(None)
    pieces, is_copied = Snapshot().take(held.pieces)
    is_copied()
    everyone = ranks.tell_first(write_file(folder, ranks.rank, Holdings(pieces, held.objects, held.common)))
    ranks.first_does(lambda: write_index(folder, [record for records in everyone for record in records], held.common))

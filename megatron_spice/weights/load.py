"""Hugging Face weights into one rank's stage of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.hf_folder import HFTensors
from megatron_spice.weights.names import Entry, split_for_rank, table
from megatron_spice.weights.stage import Stage


def load_hf(
    parameters: Mapping[str, torch.Tensor],
    folder: Path,
    architecture: ModelArchitecture,
    stage: Stage,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Copies this rank's slices of a Hugging Face folder into `parameters` (names as Megatron gives them on this stage).

    Raises:
        ValueError: a name or a shape of the folder does not match the architecture, or a parameter stays unfilled.
    """
    source = HFTensors(folder)
    entries = table(architecture)
    source.check(entries, architecture)
    fill(parameters, source, entries, architecture, stage, tensor_rank, tensor_size)


@torch.no_grad()
def fill(
    parameters: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor] | HFTensors,
    entries: Sequence[Entry],
    architecture: ModelArchitecture,
    stage: Stage,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Copies slices of `source` (Hugging Face names) into `parameters`; every parameter must be reached."""
    untouched = set(parameters)
    for entry, name in stage.held(entries):
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}, which the name table expects on stage {stage.rank}")
        tensors = [source[hf_name] for hf_name in entry.hf]
        parameters[name].copy_(split_for_rank(entry, tensors, architecture, tensor_rank, tensor_size))
        untouched.discard(name)
    if untouched:
        raise ValueError(f"parameters that the name table does not know: {sorted(untouched)[:5]}")

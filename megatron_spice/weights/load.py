"""Hugging Face weights into one rank's part of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_spice.cluster.whereabouts import moved
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.hf_folder import HFTensors
from megatron_spice.weights.names import Entry, split_for_rank, table
from megatron_spice.weights.stage import Key, Stage


def load_parameters(
    parameters: Mapping[Key, torch.Tensor],
    folder: Path,
    architecture: ModelArchitecture,
    stage: Stage,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Copies this rank's slices of a Hugging Face folder into `parameters` (keys as in `weights/stage.py`).

    Raises:
        ValueError: a name or a shape of the folder does not match the architecture, or a parameter stays unfilled.
    """
    source = HFTensors(folder)
    entries = table(architecture)
    source.check(entries, architecture)
    fill(parameters, source, entries, architecture, stage, tensor_rank, tensor_size)


@torch.no_grad()
def fill(
    parameters: Mapping[Key, torch.Tensor],
    source: Mapping[str, torch.Tensor] | HFTensors,
    entries: Sequence[Entry],
    architecture: ModelArchitecture,
    stage: Stage,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Copies slices of `source` (Hugging Face names) into `parameters`; every parameter must be reached.

    Raises:
        ValueError: the table and the model do not have the same parameters, or not of the same shape.
    """
    untouched = set(parameters)
    for entry, key in stage.held(entries, parameters):
        tensors = [source[hf_name] for hf_name in entry.hf]
        part = split_for_rank(entry, tensors, architecture, tensor_rank, tensor_size)
        if part.shape != parameters[key].shape:  # copy_ would stretch it
            raise ValueError(f"{key[1]} has shape {tuple(parameters[key].shape)}, {entry.hf} make one of {tuple(part.shape)}")
        parameters[key].copy_(part)
        moved()
        untouched.discard(key)
    if untouched:
        raise ValueError(f"parameters that the name table does not know: {sorted(untouched)[:5]}")

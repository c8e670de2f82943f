"""Where weights come from: one interface over the three kinds of folders, each read one entry of the name table at a time.

    Hugging Face   safetensors by name                                    hf_source.py
    torch_dist     Megatron's layout-free files, as our runs save them    torch_dist.py
    mp_rank        a file for each rank, as Megatron-LM's `torch` format  mp_rank.py

A source checks at once that all names of the table are there in their shapes and nothing else is, and reads later, entry by
entry: what it gives are views of mapped files wherever that is possible, so its memory is that of one entry. Sources may be
used in a forked process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import Entry, hf_shapes, merge_ranks

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Source(Protocol):
    """A model to be read.

    Attributes:
        kind: which of the three, in words.
        hf: the folder with its `config.json`, tokenizer and generation files.
        entries: the name table of its architecture.
        paths: its files, for telling whether they have changed.
    """

    kind: str
    folder: Path
    hf: Path
    architecture: ModelArchitecture
    entries: list[Entry]
    paths: list[Path]

    def dtype(self, entry: Entry) -> torch.dtype:
        """The precision of an entry's tensors."""

    def read(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """An entry's Hugging Face tensors by name."""

    def describe(self) -> list[str]:
        """Lines about the layout, for people."""


class Cast:
    """A source in another precision."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._dtype

    def read(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        return {name: tensor.to(self._dtype) for name, tensor in self._source.read(entry).items()}


def check_dtype(dtype: torch.dtype, name: str, folder: Path) -> torch.dtype:
    """The type, if weights may have it.

    Raises:
        ValueError: they may not.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{folder}: {name} is stored as {dtype}; supported: {', '.join(map(str, WEIGHT_DTYPES))}")
    return dtype


def merge(entry: Entry, slices: Sequence[torch.Tensor], architecture: ModelArchitecture) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of an entry's slices, experts cut or not; views of them where that is possible."""
    merged = merge_ranks(entry, slices, architecture, cut_experts=True)
    return {name: merged[name].reshape(shape) for name, shape in hf_shapes(entry, architecture).items()}

"""Writing Megatron's torch_dist format without Megatron: the same keys, shapes, chunks and bytes that its own saving gives
for a model on one rank (`convert/torch_dist.py` says what they are), chunk by chunk.

Beside the weights there are the extra states of linear layers, as Megatron's own layers save them (there is nothing in
them), and what Megatron looks at first: `metadata.json` with the format and `common.pt` with what is not tensors, here none.

A part is a `.distcp` file; its record says where in it each chunk lies. Chunks have no CRC, as nothing that reads them looks
at it, and it would take more time than everything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spice.checkpoint import store
from megatron_spice.checkpoint.distcp import Record, alone, save, write_index
from megatron_spice.checkpoint.hf_files import copy_small_files, set_dtype
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.convert.source import Source
from megatron_spice.convert.target import Advance, Part, Written, make_parts
from megatron_spice.convert.torch_dist import spot
from megatron_spice.weights.names import Entry, rank_shape, split_for_rank

LINEARS = ("qkv", "row", "gated")


class TorchDistTarget:
    """`weights/` and `hf/`, as `policy.model` takes them.

    Args:
        source: of what is to be written; its precisions are kept.

    Raises:
        ValueError: layers are stored in different precisions, which a stacked tensor cannot be.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.architecture = source.architecture
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        sized = []
        for entry in source.entries:
            place, dtype = spot(entry), source.dtype(entry)
            if self._dtypes.setdefault(place.key, dtype) != dtype:
                raise ValueError(f"{source.folder}: {entry.hf} are {dtype}, those of other layers {self._dtypes[place.key]}; use one")
            shape = rank_shape(entry, self.architecture, 1)
            self._sizes[place.key] = (*(number + 1 for number in place.index), *shape)
            sized.append((entry, torch.Size(shape).numel() * dtype.itemsize))
        self.parts = make_parts(sized)

    def prepare(self, folder: Path) -> None:
        (folder / store.WEIGHTS).mkdir(exist_ok=True)

    def open(self, folder: Path) -> None:
        pass

    def write(self, part: Part, folder: Path, source: Source, advance: Advance) -> Written:
        record: list[Any] = []
        torch.serialization.set_crc32_options(False)
        with open(folder / store.WEIGHTS / _file(part.number), "wb") as file:
            for entry in part.entries:
                for key, offsets, tensor in chunks(entry, list(source.read(entry).values()), self.architecture):
                    start = file.tell()
                    save(alone(tensor.contiguous().reshape(-1), tensor.shape), file)
                    record.append([key, offsets, list(tensor.shape), start, file.tell() - start])
                    advance(tensor.nbytes)
                for key in extra_states(entry, self.architecture):
                    start = file.tell()
                    save([None], file)
                    record.append([key, None, None, start, file.tell() - start])
            file.flush()
            return Written(record, [os.dup(file.fileno())])

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        write_index(folder / store.WEIGHTS, self._records(records), {})
        copy_small_files(self.source.hf, folder / store.HF)
        set_dtype(folder / store.HF, str(self.source.dtype(self.source.entries[0])).removeprefix("torch."))

    def _records(self, records: Sequence[Any]) -> Iterator[Record]:
        for number, record in enumerate(records):
            for key, offsets, sizes, start, length in record:
                place = (_file(number), start, length)
                if offsets is None:
                    yield Record(key, None, (), None, (), *place)
                else:
                    yield Record(key, self._dtypes[key], self._sizes[key], tuple(offsets), tuple(sizes), *place)


def chunks(
    entry: Entry, tensors: Sequence[torch.Tensor], architecture: ModelArchitecture
) -> Iterator[tuple[str, list[int], torch.Tensor]]:
    """Key, offsets and tensor of each chunk of an entry; gate and up projection are two of one key."""
    place = spot(entry)
    parts = tensors if entry.kind == "gated" else [split_for_rank(entry, tensors, architecture, 0, 1)]
    start = 0
    for part in parts:
        yield place.key, [*place.index, start, *[0] * (part.dim() - 1)], part.reshape(*[1] * len(place.index), *part.shape)
        start += part.shape[0]


def extra_states(entry: Entry, architecture: ModelArchitecture) -> list[str]:
    """The key of the extra state that Megatron keeps for an entry's module, where it is a linear layer."""
    place = spot(entry)
    if entry.kind not in LINEARS or not place.key.endswith(".weight"):
        return []
    sizes = [architecture.num_layers, architecture.num_experts][: len(place.index)]
    index, size = ".".join(map(str, place.index)), ".".join(map(str, sizes))
    return [f"{place.key.removesuffix('weight')}_extra_state/shard_{index}_{size}"]


def _file(number: int) -> str:
    return f"__{number}_0.distcp"

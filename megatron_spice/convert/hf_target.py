"""Writing a Hugging Face folder: safetensors shards with an index, in the stored precision or as block-FP8.

A safetensors file is the length of its header, the header (JSON: names, types, shapes, places) and the tensors' bytes without
gaps. All of it but the bytes is known before, so shards are made with their header and their full length, and filled from
several processes at once. Wider types come first in a shard, which keeps every tensor aligned.

FP8 (`quantization_config` as SGLang and vLLM read it, `config/engine_weights.py`): the layers' linears become E4M3 numbers
[m, n] and float32 factors `weight_scale_inv` [m / 128, n / 128], by the quantiser that training and the engines share.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_spice.checkpoint.hf_files import copy_small_files, set_dtype
from megatron_spice.config.engine_weights import SCALE_SUFFIX, block_fp8
from megatron_spice.convert.source import Source
from megatron_spice.convert.target import Advance, Part, Written, make_parts, write_at
from megatron_spice.weights.fp8 import DTYPES as FP8
from megatron_spice.weights.fp8 import WEIGHT_BLOCK, quantise
from megatron_spice.weights.hf_folder import DTYPES, INDEX, SINGLE
from megatron_spice.weights.names import Entry, hf_shapes
from megatron_spice.weights.plan import quantised_names

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's type and shape, its file, and the offset of its first byte in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HFTarget:
    """A folder as transformers' `save_pretrained` makes it.

    Args:
        source: of what is to be written, in the precision in which it is to be.
        fp8: the layers' linears become FP8.
        shard_bytes: a shard has at most so many, unless one entry of the name table has more.
    """

    def __init__(self, source: Source, fp8: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.source = source
        layers = range(source.architecture.num_layers)
        self.quantization = block_fp8(source.architecture, layers) if fp8 else None
        self.quantised = quantised_names(source.architecture, layers) if fp8 else frozenset()
        sized = [(entry, self._types(entry)) for entry in source.entries]
        shards = _shards(sized, shard_bytes)
        self.headers: dict[str, bytes] = {}
        self.lengths: dict[str, int] = {}
        self.places: dict[str, Place] = {}
        shard_of: dict[Entry, int] = {}
        for number, shard in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(file, {name: kind for _, kinds in shard for name, kind in kinds.items()})
            shard_of.update((entry, number) for entry, _ in shard)
        self.parts = make_parts([(entry, _bytes(kinds)) for entry, kinds in sized], shard_of.__getitem__)

    def _types(self, entry: Entry) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor that an entry becomes."""
        dtype = self.source.dtype(entry)
        found = {}
        for name, shape in hf_shapes(entry, self.source.architecture).items():
            found[name] = (FP8["e4m3"] if name in self.quantised else dtype, shape)
            if name in self.quantised:
                grid = tuple(-(-size // block) for size, block in zip(shape, WEIGHT_BLOCK, strict=True))
                found[name + SCALE_SUFFIX] = (torch.float32, grid)
        return found

    def _lay_out(self, file: str, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.headers[file] = len(text).to_bytes(8, "little") + text
        base = len(self.headers[file])
        self.lengths[file] = base + end
        for name, (dtype, shape) in kinds.items():
            self.places[name] = Place(dtype, shape, file, base + header[name]["data_offsets"][0])

    def prepare(self, folder: Path) -> None:
        for file, header in self.headers.items():
            with open(folder / file, "wb") as out:
                out.write(header)
                out.truncate(self.lengths[file])

    def open(self, folder: Path) -> None:
        pass

    def write(self, part: Part, folder: Path, source: Source, advance: Advance) -> Written:
        descriptor = os.open(folder / self.places[part.entries[0].hf[0]].file, os.O_WRONLY)
        try:
            for entry in part.entries:
                for name, tensor in source.read(entry).items():
                    for own, result in self._results(name, tensor).items():
                        assert (result.shape, result.dtype) == (self.places[own].shape, self.places[own].dtype), own
                        write_at(descriptor, result, self.places[own].offset, advance)
        except BaseException:
            os.close(descriptor)
            raise
        return Written(None, [descriptor])

    def _results(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in self.quantised:
            return {name: tensor}
        values, factors = quantise(tensor, WEIGHT_BLOCK)
        return {name: values, name + SCALE_SUFFIX: factors}

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        if len(self.headers) > 1:
            total = sum(place.num_bytes for place in self.places.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in self.places.items()}}
            (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
        copy_small_files(self.source.hf, folder)
        dtype = self.source.dtype(self.source.entries[0])
        set_dtype(folder, str(dtype).removeprefix("torch."), self.quantization)


Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _bytes(kinds: Kinds) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())


def _shards(sized: Sequence[tuple[Entry, Kinds]], limit: int) -> list[list[tuple[Entry, Kinds]]]:
    shards: list[list[tuple[Entry, Kinds]]] = []
    total = limit
    for entry, kinds in sized:
        count = _bytes(kinds)
        if not shards or total + count > limit:
            shards.append([])
            total = 0
        shards[-1].append((entry, kinds))
        total += count
    return shards

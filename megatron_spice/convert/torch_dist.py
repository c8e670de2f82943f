"""Megatron's torch_dist format: what its files call the name table's entries, and reading them one by one.

A folder holds `.metadata`, a pickle that says for each key its shape, its chunks and where in the `.distcp` files each chunk
lies; a chunk is what `torch.save` makes of one tensor. Layers are stacked: all layers' tensors of a kind share one key and
have the layer as their first dimension, experts as their second, and a chunk has one layer and one expert of them.

    decoder.layers.self_attention.linear_qkv.weight     [layers, q + k + v, hidden], rows as in `weights/names.py`
    decoder.layers.mlp.linear_fc1.weight                [layers, 2 f, hidden]: the whole gate, then the whole up projection
    decoder.layers.mlp.experts.experts.linear_fc1.weight [layers, experts, 2 f, hidden]

So nothing depends on the layout of the ranks that wrote it but the padding of the vocabulary. Megatron can be told not to
stack layers (`layers.7.`); that is read too, but not written. `.metadata` is unpickled with
nothing but the classes of such files (`convert/torch_dist_files.py`).
"""

from __future__ import annotations

import math
import mmap
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.convert.source import check_dtype, merge
from megatron_spice.convert.torch_dist_files import METADATA, read_metadata, saved_tensor
from megatron_spice.weights.names import Entry, hf_shapes, rank_shape, table

BESIDE = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "dataloader_state")
"""How keys begin that are not the model's."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an entry is: a key, and its numbers in the stacked dimensions."""

    key: str
    index: tuple[int, ...]


def spot(entry: Entry) -> Spot:
    """Megatron's key of an entry. It is that of Transformer Engine's layers whatever layers wrote it."""
    name = entry.names[-1]
    if entry.layer is None:
        return Spot(name, ())
    key = name.replace("layers.{layer}.", "layers.")
    if entry.expert is None:
        return Spot(key, (entry.layer,))
    return Spot(key.replace("{expert}", "").replace("mlp.experts.", "mlp.experts.experts."), (entry.layer, entry.expert))


def spots(entry: Entry) -> Iterator[Spot]:
    """Where an entry may be: stacked, or under a key of its layer's own."""
    stacked = spot(entry)
    norm = "mlp.linear_fc1.layer_norm_weight"  # what Megatron's own layers call the norm before experts too, though it is not fused
    for key in dict.fromkeys([stacked.key, stacked.key.replace("pre_mlp_layernorm.weight", norm)]):
        yield Spot(key, stacked.index)
        if entry.layer is not None:
            yield Spot(key.replace("layers.", f"layers.{entry.layer}.", 1), stacked.index[1:])


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a key's tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDistSource:
    """Weights of a torch_dist folder; an optimiser's state beside them is not read.

    Args:
        folder: with `.metadata` in it.
        hf: with config.json and tokenizer.

    Raises:
        ValueError: not such a folder, or its keys and shapes do not fit config.json.
    """

    kind = "torch_dist"

    def __init__(self, folder: Path, hf: Path) -> None:
        self.folder, self.hf = folder, hf
        self.architecture: ModelArchitecture = read_architecture(hf)
        self.entries = table(self.architecture)
        metadata = read_metadata(folder / METADATA)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._spots = {e: next((s for s in spots(e) if s.key in self._tensors), spot(e)) for e in self.entries}
        self._chunks = self._find_chunks(metadata)
        self._maps: dict[str, mmap.mmap] = {}
        self._check()
        self.paths = [folder / METADATA, *sorted({folder / c.file for cs in self._chunks.values() for c in cs}), hf / "config.json"]
        self._check_files()

    def _find_chunks(self, metadata: Any) -> dict[Spot, list[Chunk]]:
        """The chunks of each place in the stack, of the model's keys only."""
        stacked = {spot.key: len(spot.index) for spot in self._spots.values()}
        where = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items() if index.fqn in stacked}
        found: dict[Spot, list[Chunk]] = defaultdict(list)
        for key, depth in stacked.items():
            for chunk in self._tensors[key].chunks if key in self._tensors else ():
                info = where.get((key, chunk.offsets))
                if info is None or chunk.sizes[:depth] != torch.Size([1] * depth):
                    raise ValueError(f"{self.folder}: the chunk of {key} at {tuple(chunk.offsets)} is not one that Megatron writes")
                place = Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
                found[Spot(key, place.offsets[:depth])].append(place)
        return found

    def _check(self) -> None:
        keys = {spot.key for spot in self._spots.values()}
        missing = sorted(keys - set(self._tensors))
        extra = sorted(key for key in set(self._tensors) - keys if not key.startswith(BESIDE))
        if missing or extra:
            raise ValueError(
                f"{self.folder}: keys do not match the {self.architecture.family} architecture of {self.hf / 'config.json'}; "
                f"missing {missing[:5]} ({len(missing)} in all), unexpected {extra[:5]} ({len(extra)} in all)"
            )
        sizes: dict[str, tuple[int, ...]] = {}
        for place in self._spots.values():
            sizes[place.key] = max(sizes.get(place.key, ()), tuple(number + 1 for number in place.index))
        for entry, place in self._spots.items():
            check_dtype(self.dtype(entry), place.key, self.folder)
            found, depth = tuple(self._tensors[place.key].size), len(place.index)
            shape = rank_shape(entry, self.architecture, 1)
            if entry.kind == "vocabulary":  # padded, by how much depends on the layout that wrote it
                rows = found[depth] if len(found) > depth else 0
                shape = (max(rows, self.architecture.vocab_size), *shape[1:])
            if found != (*sizes[place.key], *shape):
                wanted = (*sizes[place.key], *shape)
                raise ValueError(f"{self.folder}: {place.key} has shape {found}, {self.hf / 'config.json'} says {wanted}")
            covered = sum(math.prod(chunk.sizes) for chunk in self._chunks[place])
            if covered != math.prod(found[depth:]):
                raise ValueError(f"{self.folder}: {place.key} {list(place.index)} is not whole: {covered} of its numbers are there")

    def _check_files(self) -> None:
        ends: dict[str, int] = defaultdict(int)
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            if Path(chunk.file).name != chunk.file:
                raise ValueError(f"{self.folder}: {METADATA} names a file outside of its folder: {chunk.file}")
            ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.length)
        for file, end in ends.items():
            path = self.folder / file
            if not path.exists() or path.stat().st_size < end:
                size = f"has {path.stat().st_size} bytes" if path.exists() else "is not there"
                raise ValueError(f"{path} {size}, {METADATA} says that at least {end} bytes are; copy the folder again")

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._tensors[self._spots[entry].key].properties.dtype

    def read(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        place = self._spots[entry]
        if entry.kind == "gated":  # gate and up are chunks of their own where one rank wrote them
            ends = accumulate((shape[0] for shape in hf_shapes(entry, self.architecture).values()), initial=0)
            return {name: self._rows(place, *ends) for name, ends in zip(entry.hf, pairwise(ends))}
        rows = self._tensors[place.key].size[len(place.index)]
        whole = self._rows(place, 0, self.architecture.vocab_size if entry.kind == "vocabulary" else rows)
        return merge(entry, [whole], self.architecture)

    def _rows(self, place: Spot, first: int, last: int) -> torch.Tensor:
        """Rows of an entry: a view of the file if one chunk has them all."""
        meta, depth = self._tensors[place.key], len(place.index)
        shape = (last - first, *meta.size[depth + 1 :])
        rows = None
        for chunk in self._chunks[place]:
            (offset, *offsets), (count, *sizes) = chunk.offsets[depth:], chunk.sizes[depth:]
            begin, end = max(first, offset), min(last, offset + count)
            if begin >= end:
                continue
            part = self._load(chunk, meta.properties.dtype).reshape(count, *sizes)[begin - offset : end - offset]
            if part.shape == shape:
                return part
            rows = torch.empty(shape, dtype=part.dtype) if rows is None else rows
            view = rows[begin - first : end - first]
            for dimension, (start, size) in enumerate(zip(offsets, sizes), 1):
                view = view.narrow(dimension, start, size)
            view.copy_(part)
        return rows

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        path = self.folder / chunk.file
        try:
            return saved_tensor(self._files(chunk.file), chunk.start, chunk.length, dtype)
        except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged at byte {chunk.start}: {error}") from error

    def _files(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with open(self.folder / file, "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def describe(self) -> list[str]:
        files = [path for path in self.paths if path.suffix == ".distcp"]
        beside = sorted(key for key in self._tensors if key.startswith(BESIDE))
        lines = [f"any layout; {len(files)} .distcp file{'s' * (len(files) > 1)} with weights"]
        return lines + ([f"beside the weights: {len(beside)} tensors of the optimiser's state"] if beside else [])

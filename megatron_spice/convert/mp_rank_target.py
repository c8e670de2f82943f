"""Writing Megatron-LM's files for each rank (`convert/mp_rank_layout.py` says how they look).

`torch.save` first makes each file without its numbers (`skip_data`: it leaves room for them), then every tensor is read
once, split, and each slice put where it belongs in each rank's file. So a file of any size costs the memory of one tensor,
and several processes fill all files together. There are no CRCs, which torch does not look at; `unzip` would complain.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spice.checkpoint.distcp import save
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.convert.find import TRACKER
from megatron_spice.convert.mp_rank_layout import (
    FILE,
    RELEASE,
    VERSION,
    Seat,
    arguments,
    chunk_keys,
    folder_name,
    key_of,
    seats,
)
from megatron_spice.convert.source import Source
from megatron_spice.convert.target import Advance, Part, Written, make_parts, write_at
from megatron_spice.weights.names import Entry, rank_shape, split_for_rank
from megatron_spice.weights.stage import Key, Stage

_LINEAR = ("qkv", "row", "gated")


class MpRankTarget:
    """A `release` as Megatron-LM loads it with the same degrees.

    Args:
        implementation: `local` or `transformer_engine`, whose layers name some parameters otherwise.
    """

    def __init__(self, source: Source, layout: ParallelLayout, implementation: str) -> None:
        self.source, self.layout, self.implementation = source, layout, implementation
        self.architecture = source.architecture
        self._seats = list(seats(layout))
        self._holders: dict[Entry, list[tuple[Seat, Key]]] = {entry: [] for entry in source.entries}
        for seat in self._seats:
            stage = self._stage(seat)
            for entry in source.entries:
                key = key_of(entry, stage, implementation)
                if key is not None:
                    self._holders[entry].append((seat, key))
        self.parts = make_parts([(entry, self._num_bytes(entry)) for entry in source.entries])
        self._offsets: dict[Seat, dict[Key, int]] = {}

    def _stage(self, seat: Seat) -> Stage:
        return Stage(seat.pipeline, self.layout, seat.expert, self.architecture.num_experts)

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        return rank_shape(entry, self.architecture, self.layout.tensor, cut_experts=True)

    def _num_bytes(self, entry: Entry) -> int:
        return torch.Size(self._shape(entry)).numel() * self.source.dtype(entry).itemsize * len(self._holders[entry])

    def _path(self, folder: Path, seat: Seat) -> Path:
        return folder / RELEASE / folder_name(seat, self.layout) / FILE

    def prepare(self, folder: Path) -> None:
        for seat in self._seats:
            path = self._path(folder, seat)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file, torch.serialization.skip_data():
                save(self._state(seat), file)

    def _state(self, seat: Seat) -> dict[str, Any]:
        """A rank's file, with tensors whose memory nobody has touched."""
        chunks: list[OrderedDict[str, Any]] = [OrderedDict() for _ in range(self.layout.virtual)]
        for entry in self.source.entries:
            for holder, (chunk, name) in self._holders[entry]:
                if holder == seat:
                    chunks[chunk][name] = torch.empty(self._shape(entry), dtype=self.source.dtype(entry))
                    if entry.kind in _LINEAR and name.endswith("weight"):
                        chunks[chunk][name.removesuffix("weight") + "_extra_state"] = None
        dtype = str(self.source.dtype(self.source.entries[0])).removeprefix("torch.")
        args = arguments(self.architecture, self.layout, dtype, self.implementation)
        return {"args": args, "checkpoint_version": VERSION, "iteration": 0} | dict(zip(chunk_keys(self.layout.virtual), chunks))

    def open(self, folder: Path) -> None:
        for seat in self._seats:
            keys = [key for chunk in range(self.layout.virtual) for key in self._keys(seat) if key[0] == chunk]
            self._offsets[seat] = dict(zip(keys, record_offsets(self._path(folder, seat)), strict=True))

    def _keys(self, seat: Seat) -> list[Key]:
        return [key for holders in self._holders.values() for holder, key in holders if holder == seat]

    def write(self, part: Part, folder: Path, source: Source, advance: Advance) -> Written:
        files: dict[Seat, int] = {}
        try:
            for entry in part.entries:
                tensors = list(source.read(entry).values())
                for rank in range(self.layout.tensor):
                    mine = split_for_rank(entry, tensors, self.architecture, rank, self.layout.tensor, cut_experts=True).contiguous()
                    for seat, key in self._holders[entry]:
                        if seat.tensor == rank:
                            if seat not in files:
                                files[seat] = os.open(self._path(folder, seat), os.O_WRONLY)
                            write_at(files[seat], mine, self._offsets[seat][key], advance)
        except BaseException:
            for descriptor in files.values():
                os.close(descriptor)
            raise
        return Written(None, list(files.values()))

    def finish(self, folder: Path, records: Sequence[Any]) -> None:
        (folder / TRACKER).write_text(RELEASE)


def record_offsets(path: Path) -> list[int]:
    """Where the tensors of a file of `torch.save` lie, in the order in which they were saved: the zip archive that it is has a
    record `data/N` for each."""
    records = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            match = re.fullmatch(r".*/data/(\d+)", info.filename)
            if match is not None:
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                records[int(match[1])] = info.header_offset + 30 + name + extra
    return [records[number] for number in range(len(records))]

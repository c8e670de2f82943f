"""Writing Megatron's torch_dist format: a `.distcp` file for each rank, and the index that makes them a checkpoint.

A block of a tensor, or an object, is what `torch.save` makes of it, one behind the other; `.metadata` says where each lies.
Blocks have no CRC, as nothing that reads them looks at it, and it would take longer than everything else.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_spice.checkpoint.pieces import Holdings
from megatron_spice.cluster.whereabouts import moved

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
METADATA = ".metadata"
COMMON = "common.pt"
FORMAT_NAME = "metadata.json"
AROUND_A_BLOCK = 2048  # bytes; what torch.save puts around one, and its place in the index


@dataclass(frozen=True, slots=True)
class Record:
    """Where a block or an object (without `dtype`, `whole`, `offsets` and `sizes`) lies in which file."""

    key: str
    dtype: torch.dtype | None
    whole: tuple[int, ...]
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def save(value: Any, file: IO[bytes]) -> None:
    """`torch.save`, of whose failures the disk's are told as such: it would only say that it is at an unexpected place.

    Raises:
        OSError: no space, and the like.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def alone(flat: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A flat host tensor's numbers over a storage that has no others, in a shape: `torch.save` writes whole storages."""
    return torch.frombuffer(memoryview(flat.view(torch.uint8).numpy()).cast("B"), dtype=flat.dtype).view(tuple(shape))


def file_size(held: Holdings) -> int:
    """Bytes that a rank's file and its share of the index take, about and not less."""
    return sum(piece.tensor.nbytes + AROUND_A_BLOCK for piece in held.pieces) + sum(map(len, held.objects.values()))


def write_file(folder: Path, rank: int, held: Holdings) -> list[Record]:
    """Writes what a rank holds, in host memory, into its file in `folder` and brings it to the disk."""
    torch.serialization.set_crc32_options(False)
    name, records = f"__{rank}_0.distcp", []
    with open(folder / name, "wb") as file:
        for piece in held.pieces:
            start = file.tell()
            save(alone(piece.tensor, piece.sizes), file)
            place = (name, start, file.tell() - start)
            records.append(Record(piece.key, piece.tensor.dtype, piece.whole, piece.offsets, piece.sizes, *place))
            moved()
        for key, content in held.objects.items():
            records.append(Record(key, None, (), None, (), name, file.tell(), file.write(content)))
        _sync(file)
    return records


def write_index(folder: Path, records: Iterable[Record], common: dict[str, Any]) -> None:
    """Writes everything that is beside the ranks' files, and brings it and the names to the disk.

    Raises:
        ValueError: the records do not make up whole tensors, each number once.
    """
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        index = MetadataIndex(record.key, None if record.offsets is None else torch.Size(record.offsets))
        if index in stored:
            raise ValueError(f"{record.key} at {record.offsets} is saved by two ranks")
        stored[index] = _StorageInfo(record.file, record.start, record.length)
        if record.dtype is None:
            tensors[record.key] = BytesStorageMetadata()
            continue
        if record.key not in tensors:
            tensors[record.key] = TensorStorageMetadata(TensorProperties(dtype=record.dtype), torch.Size(record.whole), [])
        tensors[record.key].chunks.append(ChunkStorageMetadata(torch.Size(record.offsets), torch.Size(record.sizes)))
    for key, tensor in tensors.items():
        if isinstance(tensor, TensorStorageMetadata):
            held, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
            if held != whole:
                raise ValueError(f"{key} has {whole} numbers, and the ranks save {held} of it")
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(tensors, storage_data=stored, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION), file)
        _sync(file)
    with open(folder / COMMON, "wb") as file:
        save(common, file)
        _sync(file)
    with open(folder / FORMAT_NAME, "w") as file:
        json.dump(FORMAT, file)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())

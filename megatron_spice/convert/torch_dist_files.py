"""The files of a torch_dist folder: `.metadata`, and one tensor in the middle of a `.distcp` file. Neither is trusted.

A pickle can run whatever it likes, so `.metadata` is unpickled with nothing but the classes of such files; tensors are read
by `torch.load` with `weights_only`, which takes the same care.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_spice.checkpoint.distcp import METADATA

__all__ = ["METADATA", "read_metadata", "saved_tensor"]


def saved_tensor(file: mmap.mmap, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What `torch.save` wrote into the middle of a file, as a view of it.

    `torch.load` would copy the numbers, which takes as long as writing them again. So it is asked for all but them, and they
    are looked up in the zip archive that `torch.save` makes, where they lie uncompressed.
    """
    stream = _Window(file, start, length)
    shape = torch.load(stream, map_location="meta", weights_only=True)
    if shape.dtype != dtype:
        raise ValueError(f"a tensor of {shape.dtype}, which should be {dtype}")
    stream.seek(0)
    [data] = [info for info in zipfile.ZipFile(stream).infolist() if "/data/" in info.filename]
    header = start + data.header_offset
    name, extra = struct.unpack_from("<HH", file, header + 26)
    offset = header + 30 + name + extra
    if data.compress_type != zipfile.ZIP_STORED or offset + data.file_size > start + length:
        raise ValueError("it is not as torch.save writes it")
    storage = torch.frombuffer(memoryview(file)[offset : offset + data.file_size], dtype=dtype)
    return storage.as_strided(shape.shape, shape.stride(), shape.storage_offset())


class _Window(io.RawIOBase):
    """Part of a mapped file as a file."""

    def __init__(self, file: mmap.mmap, start: int, length: int) -> None:
        self._bytes = memoryview(file)[start : start + length]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._bytes) - self._at)
        buffer[:count] = self._bytes[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._bytes))[whence])
        return self._at

    def tell(self) -> int:
        return self._at


_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch": {"Size", "device", "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "uint8", "int8", "int32", "int64", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
"""What `.metadata` is made of: modules, and the names in them (None: all)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron."):  # versions of Megatron-Core keep their own plans in it, which nothing here needs
            return _Foreign
        if module in _CLASSES and (_CLASSES[module] is None or name in _CLASSES[module]) and "." not in name:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no such file does: it is damaged, or made to do harm")


class _Foreign(SimpleNamespace):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def read_metadata(path: Path) -> Any:
    """The `.metadata` of a torch_dist folder, without running what a pickle may hold.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.state_dict_metadata, metadata.storage_data  # noqa: B018
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there: {path.parent} is no torch_dist checkpoint, or not a whole one") from error
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(f"{path} cannot be read: {error}") from error
    return metadata

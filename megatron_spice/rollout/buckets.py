"""Weights on their way to an engine: many tensors in one flat piece of memory that both processes map.

The engine's HTTP request carries only a pickle of a *handle* of one uint8 tensor (shared memory on a CPU, CUDA IPC on an
accelerator), under a name that says where in it which tensor lies; `bucket_loader.py` reads it in the engine.

Tensors start at multiples of 16 bytes, so that a mixture of types can be viewed in place. Tensors that lie in memory that can
be shared already, one beside the other as the gatherer leaves them (on a CPU in a `Parcel`), are sent from where they are.
"""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # noqa: F401  teaches ForkingPickler to send tensors as handles

from megatron_spice.cluster.interruption import SIGNALS

_ALIGNMENT = 16


class Parcel:
    """Host memory that an engine's process can map, used again for one bucket after the other.

    Fresh memory costs a page fault every 4 KiB, ten times what a copy into it does. Call it for a flat tensor; it has two
    blocks, so the one before stays as it is and the one before that is overwritten.
    """

    def __init__(self) -> None:
        self._blocks = [torch.empty(0, dtype=torch.uint8)] * 2

    def __call__(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = num_elements * dtype.itemsize
        block, later = self._blocks
        if block.numel() < num_bytes:
            block = _share(torch.empty(num_bytes, dtype=torch.uint8))
        self._blocks = [later, block]
        return block[:num_bytes].view(dtype)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a bucket a tensor lies: bytes `start` to `end`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors as an engine gets them. The memory stays alive as long as this does.

    `flat` [bytes] uint8, in shared memory if on the CPU. `lasting`: the sender will use this memory again, so the receiver
    had better keep it mapped.
    """

    flat: torch.Tensor
    places: tuple[Place, ...]
    lasting: bool

    def serialise(self, check: bool = False) -> str:
        """The base64 text that SGLang's HTTP interface takes, for one rank of an engine.

        Args:
            check: the engine is to compare its parameters with what was sent.
        """
        tensors = [
            (each.name, str(each.dtype).removeprefix("torch."), each.shape, each.start, each.end) for each in self.places
        ]
        about = json.dumps({"lasting": self.lasting, "check": check, "tensors": tensors})
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump([(about, self.flat)])
        return base64.b64encode(buffer.getvalue()).decode()


def flatten(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    """Tensors in one piece of memory, where they are if they lie in one already.

    Raises:
        ValueError: there is no tensor, a name occurs twice, or the tensors are on different devices.
    """
    names = [name for name, _ in named_tensors]
    devices = {tensor.device for _, tensor in named_tensors}
    if len(devices) != 1 or len(set(names)) != len(names):
        raise ValueError(f"a bucket needs tensors of one device under different names, not {names} on {devices}")
    if (found := _in_place(named_tensors)) is not None:
        return found
    places, end = [], 0
    for name, tensor in named_tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        places.append(Place(name, tensor.dtype, tuple(tensor.shape), start, end))
    flat = torch.empty(end, dtype=torch.uint8, device=devices.pop())
    if flat.device.type == "cpu":
        _share(flat)
    for (_, tensor), place in zip(named_tensors, places, strict=True):
        flat[place.start : place.end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return Bucket(flat, tuple(places), lasting=False)


def _in_place(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket | None:
    """The same for tensors of one block that can be shared, as any can on an accelerator, without a copy; None if they are not."""
    block = named_tensors[0][1].untyped_storage()
    on_host = block.device.type == "cpu"
    if on_host and not block.is_shared():
        return None
    begin, size = block.data_ptr(), block.nbytes()
    places, last = [], 0
    for name, tensor in named_tensors:
        start = tensor.data_ptr() - begin
        end = start + tensor.numel() * tensor.element_size()
        if start < 0 or end > size or not tensor.is_contiguous():
            return None
        places.append(Place(name, tensor.dtype, tuple(tensor.shape), start, end))
        last = max(last, end)
    flat = torch.empty(0, dtype=torch.uint8, device=block.device).set_(block)[:last]
    return Bucket(flat, tuple(places), lasting=on_host)


def _share(flat: torch.Tensor) -> torch.Tensor:
    """Moves it into shared memory that is passed on by file name: passing file descriptors needs a secret that only a parent
    and its multiprocessing children share."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    # The first call starts a process of torch's that keeps the files' names, and sharing fails without it. It inherits what is
    # blocked: signals that Slurm and terminals send to all of a job's processes must not end it before the ranks have saved.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return flat.share_memory_()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

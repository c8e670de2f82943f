"""Weights on their way to an engine: many tensors in one flat piece of memory that both processes map.

The engine's HTTP request carries only a pickle of *handles*: of one uint8 tensor (shared memory on a CPU, CUDA IPC on
an accelerator) and of a list that says where in it which tensor lies. This is SGLang's `flattened_bucket` format.
SGLang's own helpers for it live behind an import of all of SGLang: measured, 3 to 4 s and some 3,000 modules in every
trainer that hosts an engine, and it patches transformers on the way. The format needs none of it: the receiver reads
six attributes of each entry, and its restricted unpickler admits `types.SimpleNamespace`. So that is what is sent, and
a test against the real server holds it.

Tensors start at multiples of 16 bytes, so that a mixture of types can be viewed in place. Tensors that lie in shared memory
already, one beside the other as the gatherer leaves them in a `Parcel`, are sent from where they are.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing  # noqa: F401  teaches ForkingPickler to send tensors as handles

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


def flatten(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, list[SimpleNamespace]]:
    """One uint8 tensor with all the bytes, in shared memory if on the CPU, and where each tensor lies in it.

    Raises:
        ValueError: there is no tensor, a name occurs twice, or the tensors are on different devices.
    """
    names = [name for name, _ in named_tensors]
    devices = {tensor.device for _, tensor in named_tensors}
    if len(devices) != 1 or len(set(names)) != len(names):
        raise ValueError(f"a bucket needs tensors of one device under different names, not {names} on {devices}")
    if (found := _in_place(named_tensors)) is not None:
        return found
    layout: list[SimpleNamespace] = []
    end = 0
    for name, tensor in named_tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        layout.append(_place(name, tensor, start, end))
    flat = torch.empty(end, dtype=torch.uint8, device=devices.pop())
    if flat.device.type == "cpu":
        _share(flat)
    for (_, tensor), place in zip(named_tensors, layout, strict=True):
        flat[place.start_idx : place.end_idx].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return flat, layout


def _in_place(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, list[SimpleNamespace]] | None:
    """The same for tensors of one shared block, without a copy; None if they are not."""
    storages = [tensor.untyped_storage() for _, tensor in named_tensors]
    first = storages[0]
    if first.device.type != "cpu" or not first.is_shared():
        return None
    if not all(s.data_ptr() == first.data_ptr() and t.is_contiguous() for s, (_, t) in zip(storages, named_tensors)):
        return None
    layout = []
    for name, tensor in named_tensors:
        start = tensor.storage_offset() * tensor.element_size()
        layout.append(_place(name, tensor, start, start + tensor.numel() * tensor.element_size()))
    flat = torch.empty(0, dtype=torch.uint8).set_(first)
    return flat[: max(place.end_idx for place in layout)], layout


def _place(name: str, tensor: torch.Tensor, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)


def _share(flat: torch.Tensor) -> torch.Tensor:
    """Moves it into shared memory that is passed on by file name: passing file descriptors needs a secret that only a parent
    and its multiprocessing children share."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    return flat.share_memory_()


def serialise(flat: torch.Tensor, layout: list[SimpleNamespace]) -> str:
    """The base64 text that SGLang's HTTP interface takes. `flat` must stay alive until the engine has answered."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump({"flattened_tensor": flat, "metadata": layout})
    return base64.b64encode(buffer.getvalue()).decode()


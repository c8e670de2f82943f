"""Host copies of device memory whose tensors go on existing.

A storage's bytes are copied to the host and the storage is shrunk to nothing. All tensors on it, such as the parameters
and shards that view one of Megatron's buffers, stay the objects they are, and are whole again when the bytes are back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_spice.cluster.host_memory import host_memory


class Shelf:
    """Where the bytes of storages of one device lie while the storages have none. Host memory is allocated once and kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.uint8)
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def num_bytes(self) -> int:
        """What lies on it, which `take_back` needs on the device."""
        return sum(size for _, size in self._sizes)

    def put(self, tensors: Iterable[torch.Tensor]) -> int:
        """Copies the storages under `tensors` that are on the device, each once, and empties them. Returns their bytes."""
        assert not self._sizes, "the shelf is full"
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device.type == self._device.type and storage.nbytes():
                storages[storage.data_ptr()] = storage
        self._sizes = [(storage, storage.nbytes()) for storage in storages.values()]
        total = sum(size for _, size in self._sizes)
        if total > self._host.numel():
            self._host = self._host[:0].clone()  # the old memory goes first
            self._host = host_memory(total, pinned=self._device.type == "cuda")
        for storage, _, copy in self._with_copies():
            copy.copy_(_bytes_of(storage), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        for storage, _ in self._sizes:
            storage.resize_(0)
        return total

    def take_back(self) -> None:
        """Fills the storages again, in stream order on CUDA; nothing to do if none was put."""
        for storage, size, copy in self._with_copies():
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self._sizes = []

    def _with_copies(self) -> Iterator[tuple[torch.UntypedStorage, int, torch.Tensor]]:
        start = 0
        for storage, size in self._sizes:
            yield storage, size, self._host[start : start + size]
            start += size


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

"""Host copies of device memory whose tensors go on existing.

A storage's bytes are copied to the host and the storage is shrunk to nothing. All tensors on it, such as the parameters
and shards that view one of Megatron's buffers, stay the objects they are, and are whole again when the bytes are back. Their
numbers can be read where they lie, which is how a policy that sleeps is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_spice.cluster.host_memory import host_memory

ALIGNMENT = 64  # bytes; any dtype may begin there


class Shelf:
    """Where the bytes of storages of one device lie while the storages have none. Host memory is allocated once and kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.uint8)
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        self._places: dict[int, int] = {}  # where in host memory the bytes of a storage begin, by its address

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
        total = 0
        for storage, size in self._sizes:
            self._places[storage._cdata] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        if total > self._host.numel():
            self._host = self._host[:0].clone()  # the old memory goes first
            self._host = host_memory(total, pinned=self._device.type == "cuda")
        for storage, _, copy in self._with_copies():
            copy.copy_(_bytes_of(storage), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        for storage, _ in self._sizes:
            storage.resize_(0)
        return self.num_bytes

    def lying(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A contiguous tensor's numbers over the host memory that they lie in; None if its storage does not lie here."""
        if (start := self._places.get(tensor.untyped_storage()._cdata)) is None:
            return None
        begin = start + tensor.storage_offset() * tensor.element_size()
        return self._host[begin : begin + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)

    def take_back(self) -> None:
        """Fills the storages again, in stream order on CUDA; nothing to do if none was put."""
        for storage, size, copy in self._with_copies():
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self._sizes, self._places = [], {}

    def _with_copies(self) -> Iterator[tuple[torch.UntypedStorage, int, torch.Tensor]]:
        for storage, size in self._sizes:
            start = self._places[storage._cdata]
            yield storage, size, self._host[start : start + size]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

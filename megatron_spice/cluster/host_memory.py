"""Host memory of a training process on a CPU, where activations live in it.

glibc asks the kernel for every large block anew and gives it back when it is freed. The kernel must then zero the pages
again, one fault each: for a small model on two cores that is a tenth of an update. With `TUNABLES` freed blocks are kept
for the next ones, and `give_back_freed_memory` gives them back where a process goes to sleep.

The thread cache has to be off with it: it would hold on to the crumbs that aligned blocks leave beside them, and glibc
before 2.38 then finds no freed block large enough for the next one of the same size (measured: eight times the memory).
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=-1:glibc.malloc.top_pad=67108864:glibc.malloc.tcache_count=0"
"""For the environment variable GLIBC_TUNABLES, which glibc reads as a process starts; other C libraries do not."""


def give_back_freed_memory() -> None:
    """Hands all whole free pages back to the kernel; does nothing where the C library cannot."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def host_memory(num_bytes: int, pinned: bool) -> torch.Tensor:
    """uint8 [num_bytes], contents undefined; `pinned`: page-locked, for copies that the device makes by itself."""
    import torch

    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if pinned:
        # Tensor.pin_memory() would round up to a power of two: up to twice the memory for tens of GiB.
        from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

        pin_memory(memory.data_ptr(), num_bytes)
        weakref.finalize(memory, unpin_memory, memory.data_ptr()).atexit = False
    return memory


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None

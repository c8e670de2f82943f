"""Host memory of a training process on a CPU, where activations live in it.

glibc asks the kernel for every large block anew and gives it back when it is freed. The kernel must then zero the pages
again, one fault each: for a small model on two cores that is a fifth of an update. Freed blocks are therefore kept for
the next ones, and given back where a process goes to sleep.

Where the C library is another (musl, macOS) nothing is done: it has no such setting.
"""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
PAD = 2**26  # bytes asked for beyond what is needed, so that a heap that grows does so in few steps


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed for the next allocation. Returns whether this C library can."""
    library = _glibc()
    if library is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: PAD}
    return all(library.mallopt(name, value) for name, value in settings.items())


def give_back_freed_memory() -> None:
    """Hands all whole free pages back to the kernel."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None

"""Whether a thread waits for other ranks, and in which call: read off its Python stack.

Collectives are recognised by the file they stand in: torch's own, and Megatron's wrappers around handles whose `wait` leaves no
Python frame. The outermost call counts, which is the one that the code's author wrote: `all_gather_object`, not its `all_gather`.
"""

from __future__ import annotations

import sys
from types import FrameType

# End of a file's path -> the functions in it that mean waiting; None: any.
_WAITING: dict[str, frozenset[str] | None] = {
    "torch/distributed/distributed_c10d.py": None,
    "megatron/core/pipeline_parallel/p2p_communication.py": None,
    "megatron/core/distributed/param_and_grad_buffer.py": None,
    "megatron_spice/rollout/pool.py": frozenset({"_wait_for_hosts", "_wait_for_starts"}),
}
_DEPTH = 25


def waits_in(thread: int | None) -> str | None:
    """The name of the call in which a thread waits for other ranks; None: it does something else.

    On an accelerator the backward pass runs in threads of autograd's, and `thread` in none of Python's: they are looked at too.
    """
    frames = sys._current_frames()
    first = frames.pop(thread, None) if thread is not None else None
    found = _waits(first)
    if found is None and first is not None and first.f_code.co_name == "_engine_run_backward":
        found = next(filter(None, map(_waits, frames.values())), None)
    return found


def stands_at(thread: int | None) -> str:
    """The innermost line of a thread, as `file.py:12 in function`."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "nowhere"
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def _waits(frame: FrameType | None) -> str | None:
    found = None
    for _ in range(_DEPTH):
        if frame is None:
            break
        name = frame.f_code.co_name
        for end, functions in _WAITING.items():
            if frame.f_code.co_filename.endswith(end) and (functions is None or name in functions):
                found = name.strip("_")
        frame = frame.f_back
    return found

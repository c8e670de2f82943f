"""Writing a checkpoint's tensors while the run goes on.

Megatron-Core divides a save in three: planning (all ranks), writing (each rank its own files), and finishing (all ranks, once
every file is on disk). The middle part is meant for another process, which it forks. Here it is a thread: writing is files
and fsync, which need no interpreter lock, and a fork of a process with CUDA, gloo and a server's connections in it is a risk
that nobody would see until it hangs.

What is written is a copy in host memory. On an accelerator Megatron's own staging makes it. On a CPU that staging gives the
tensors themselves, which the next step would change under the writer's hands, so they are copied.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


class BackgroundWrite:
    """One rank's part of a save: copied to host memory when this is made, then written by a thread.

    Args:
        request: what `dist_checkpointing.save(..., async_sharded_save=True)` returned.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._thread: threading.Thread | None = None
        if request.async_fn is not None:  # this rank has tensors to write
            transforms, _ = request.async_fn.args
            _, live, results = request.async_fn_args
            buckets = request.preload_fn()
            for staged, bucket in zip(buckets, live, strict=True):
                _detach(staged[-1][1], bucket[-1][1])
            self._thread = threading.Thread(target=_write, args=(transforms, buckets, results), name="checkpoint", daemon=True)
            self._thread.start()

    def is_written(self) -> bool:
        """Whether every rank has written its files, or failed to; a collective."""
        word = torch.tensor([int(self._thread is None or not self._thread.is_alive())])
        dist.all_reduce(word, op=dist.ReduceOp.MIN)
        return bool(word)

    def finish(self) -> None:
        """Waits for this rank's files and writes what makes them a checkpoint; a collective.

        Raises:
            CheckpointException: a rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        dist.barrier()
        for each in self._request.finalize_fns:
            each()


def _detach(staged: list[tuple[Any, torch.Tensor]], live: list[tuple[Any, torch.Tensor]]) -> None:
    """Makes staged tensors that are the live ones into copies, and lets the live ones go; in place, one at a time."""
    for place, (item, tensor) in enumerate(staged):
        if tensor is live[place][1]:
            staged[place] = (item, tensor.clone())
        live[place] = staged[place]


def _write(transforms: list[Any], buckets: list[tuple], results: queue.Queue) -> None:
    """Writes all buckets with Megatron's own function, and leaves what came of it where its `finish` looks."""
    counter = _Counter()
    for number, bucket in enumerate(buckets):
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, counter, counter, use_fsync=True)
    failed = [result for _, result in counter.results if isinstance(result, Exception)]
    results.put(failed[0] if failed else dict(counter.results))


class _Counter:
    """Stands for the two queues that Megatron's writer reports through when it is a process."""

    def __init__(self) -> None:
        self.results: list[tuple[int, Any]] = []

    def put(self, result: tuple[int, Any]) -> None:
        self.results.append(result)

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass

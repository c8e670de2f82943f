"""The sampler's passages through NVIDIA DALI: a process beside reads ahead, the run takes what is ready.

What DALI gives here is background work: an external source in a process of its own follows the sampler's order (a pure
function of seed and position, so nobody has to tell it what comes next), reads and verifies the tokens, and hands them over
in shared memory; the pipeline pads them to a batch, on the GPU if one is given. It is worth its process where reading waits
for a file system: a corpus far larger than memory, a network mount. From a cold local disk a consumer with other work to do
waited half to three quarters as long for DALI's batches as for `PassageSampler`'s. From the page cache `PassageSampler` is
1.4 to 2.5 times faster, because a passage costs less to read than to hand from one process to another; and either is a few
milliseconds of an iteration (tools/benchmark.py passages, docs/results/passages-cpu). The game plays with text in host
memory, so training uses a CPU pipeline wherever it runs; `next_padded` with a `device_id` is for those who train on passages
as they are. (The GPU pipeline has not been run by its author, who had no GPU.)

Same passages, same order, same `state_dict` as `PassageSampler`. The cursor counts what was handed out, not what was read
ahead, so a resumed run misses nothing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.game.records import Passage

_TYPES = {"uint16": types.UINT16, "int32": types.INT32}
_READ_AHEAD = 2  # batches
_PR_SET_PDEATHSIG = 1


class DaliSampler:
    """Hands out the passages that `PassageSampler` with the same arguments would; `close` ends its process.

    Args:
        corpus, seed, weights: as for `PassageSampler`.
        batch_size: passages read at a time, such as an iteration's.
        device_id: the GPU that `next_padded` puts its batches on; None: host memory.
        pad_id: what fills the batches behind shorter passages.

    Raises:
        ValueError: what `PassageSampler` raises.
    """

    def __init__(
        self, corpus: Corpus, seed: int, weights: Mapping[str, float] | None = None, *, batch_size: int,
        device_id: int | None = None, pad_id: int = 0,
    ):  # fmt: skip
        self._corpus, self._batch_size, self._device_id, self._pad_id = corpus, batch_size, device_id, pad_id
        self._sampler = PassageSampler(corpus, seed, weights)
        self._tokenizer = _HashOnly(corpus.manifest.tokenizer["hash"])
        self._source = (corpus.path.resolve(), self._tokenizer, seed, weights and dict(weights))
        self._pipeline: Pipeline | None = None
        self._workers: list[BaseProcess] = []
        self._ready: deque[np.ndarray] = deque()

    def next(self, count: int) -> list[Passage]:
        """The next `count` passages. Raises what `Corpus.token_ids` does."""
        while len(self._ready) < count:
            ids, lengths = (_on_host(output) for output in self._run())
            self._ready += [row[:length].copy() for row, length in zip(ids, lengths.ravel().tolist())]
        return [self._corpus.with_ids(index, self._ready.popleft()) for index in self._sampler.next_indices(count)]

    def next_padded(self) -> tuple[Any, Any]:
        """The next `batch_size` passages as DALI tensor lists, on the pipeline's device, valid until the next call.

        Returns:
            ids [batch_size, longest] of the corpus's dtype, padded at the end, and int32 lengths [batch_size, 1].
        """
        assert not self._ready, "next_padded follows a whole number of batches"
        outputs = self._run()
        self._sampler.next_indices(self._batch_size)
        return outputs

    def state_dict(self) -> dict[str, Any]:
        """That of a `PassageSampler` which has given out the same passages."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, this class's or `PassageSampler`'s; raises what that does."""
        self._sampler.load_state_dict(state)
        self.close()

    def close(self) -> None:
        """End the background process; the next passages start another."""
        self._pipeline = None
        self._ready.clear()

    def _run(self) -> tuple[Any, Any]:
        if self._pipeline is None:
            others = multiprocessing.active_children()
            self._pipeline = self._start(self._sampler.state_dict()["cursor"])
            self._workers = [child for child in multiprocessing.active_children() if child not in others]
        try:
            # A process that was killed while it waited for work would be asked for more, and waited for without end.
            if connection.wait([process.sentinel for process in self._workers], timeout=0):
                raise RuntimeError("the process that reads the corpus ahead was killed; is memory short?")
            return self._pipeline.run()
        except Exception as error:
            self.close()
            if error.__cause__ is None:
                raise
            # DALI gives the reader's traceback as the message, and what the reader said as the cause.
            raise ValueError(str(error.__cause__)) from error

    def _start(self, position: int) -> Pipeline:
        """A pipeline whose first batch begins with draw number `position`."""
        pipeline = Pipeline(
            batch_size=self._batch_size, num_threads=1, device_id=self._device_id, prefetch_queue_depth=_READ_AHEAD,
            # A forked child of a process with CUDA and threads is not safe.
            py_num_workers=1, py_start_method="spawn",
        )  # fmt: skip
        with pipeline:
            ids, lengths = fn.external_source(
                _Reader(*self._source, position), num_outputs=2, batch=False, parallel=True, ndim=[1, 1],
                dtype=[_TYPES[self._corpus.manifest.dtype], types.INT32], prefetch_queue_depth=_READ_AHEAD,
            )  # fmt: skip
            if self._device_id is not None:
                ids, lengths = ids.gpu(), lengths.gpu()
            pipeline.set_outputs(fn.pad(ids, fill_value=self._pad_id), lengths)
        pipeline.build()
        return pipeline


@dataclass(frozen=True)
class _HashOnly:
    """As much of a tokenizer as `Corpus` needs to hand out ids."""

    vocab_hash: str


class _Reader:
    """What runs in the background process: sample number n of the pipeline is draw number `position` + n of the order."""

    def __init__(
        self, path: Path, tokenizer: _HashOnly, seed: int, weights: Mapping[str, float] | None, position: int
    ):
        self._arguments = (path, tokenizer, seed, weights, position)
        self._parent = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrived in the process: opens the corpus there."""
        self.__dict__.update(state)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run
        _die_with(self._parent)
        path, tokenizer, seed, weights, self._position = self._arguments
        self._corpus = Corpus(path, tokenizer)
        self._sampler = PassageSampler(self._corpus, seed, weights)

    def __call__(self, sample: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = self._corpus.token_ids(self._sampler.index_at(self._position + sample.idx_in_epoch))
        return ids, np.array([len(ids)], np.int32)


def _die_with(parent: int) -> None:
    """DALI's workers outlive a parent that is killed, so the kernel is told to end this one (on Linux, where DALI is)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _on_host(output: Any) -> np.ndarray:
    """A pipeline's output as an array of the host, which it shares where it lies there."""
    return (output.as_cpu() if hasattr(output, "as_cpu") else output).as_array()


"""A copy of the policy's weights to compare the policy with, in host memory (pinned on CUDA); each rank keeps its own part.

While the copy is needed it changes places with the weights, a part at a time, so the device never holds two models and the
host never holds a third: the parameters stay the tensors they are, and the bits that come back are those that went.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_spice.cluster.host_memory import host_memory

PART = 2**26
"""Bytes exchanged at a time; so much more memory the exchange takes on the device."""


class Reference:
    """One rank's weights as they are when it is made."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        """
        Args:
            buffers: contiguous tensors under which all weights lie; they must keep their shapes.
        """
        self._buffers = list(buffers)
        self._copies = []
        for buffer in self._buffers:
            copy = host_memory(buffer.numel() * buffer.element_size(), pinned=buffer.is_cuda).view(buffer.dtype)
            self._copies.append(copy.copy_(buffer.detach().view(-1)))

    @property
    def num_bytes(self) -> int:
        """Host memory it takes on this rank."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy computes with the weights of the copy, which must not be changed; afterwards with its own."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for buffer, copy in zip(self._buffers, self._copies):
            size = max(1, PART // buffer.element_size())
            for here, there in zip(buffer.detach().view(-1).split(size), copy.split(size)):
                ours = here.clone()
                here.copy_(there, non_blocking=True)
                there.copy_(ours, non_blocking=True)  # in stream order: after the copy that read it
        if any(buffer.is_cuda for buffer in self._buffers):
            torch.cuda.synchronize()

"""Padding of the vocabulary, so that its rows divide evenly over tensor-parallel ranks."""

from __future__ import annotations

ROWS_PER_RANK = 128


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """The smallest multiple of 128 x tensor parallel size that holds `vocab_size`, as Megatron-LM pads."""
    step = ROWS_PER_RANK * tensor_parallel_size
    return -(-vocab_size // step) * step

from __future__ import annotations

import base64
import pickle

import pytest
import torch

from megatron_spice.rollout.buckets import flatten, serialise

MIXED = [
    ("a", torch.arange(3, dtype=torch.bfloat16)),
    ("b", torch.randn(5, 2)),
    ("c", torch.tensor(7, dtype=torch.int64)),
    ("d", torch.randn(4, 6).t()),
]


def read(flat: torch.Tensor, layout: list) -> dict[str, torch.Tensor]:
    """As the receiver does it."""
    return {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in layout}


def test_tensors_of_mixed_types_and_strides_come_out_as_they_went_in() -> None:
    flat, layout = flatten(MIXED)
    found = read(flat, layout)
    assert list(found) == [name for name, _ in MIXED]
    for name, tensor in MIXED:
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_the_request_holds_handles_and_not_the_weights() -> None:
    flat, layout = flatten([("w", torch.randn(1000, 1000))])
    text = serialise(flat, layout)
    assert flat.is_shared() and len(text) < 4096
    received = pickle.loads(base64.b64decode(text))
    assert torch.equal(read(received["flattened_tensor"], received["metadata"])["w"], read(flat, layout)["w"])


def test_an_empty_bucket_and_a_name_that_occurs_twice_are_errors() -> None:
    with pytest.raises(ValueError, match="bucket"):
        flatten([])
    with pytest.raises(ValueError, match="different names"):
        flatten([("w", torch.ones(1)), ("w", torch.ones(1))])

from __future__ import annotations

import base64
import pickle

import pytest
import torch

from megatron_spice.rollout.buckets import Parcel, flatten, serialise

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


def test_what_lies_in_a_parcel_is_sent_from_where_it_is() -> None:
    parcel = Parcel()
    first = parcel(10, torch.float32)
    first.copy_(torch.arange(10))
    named = [("b", first[4:10].view(2, 3)), ("a", first[:4])]
    flat, layout = flatten(named)
    assert flat.data_ptr() == first.data_ptr() and flat.is_shared()
    assert all(torch.equal(read(flat, layout)[name], tensor) for name, tensor in named)
    received = pickle.loads(base64.b64decode(serialise(flat, layout)))
    assert torch.equal(read(received["flattened_tensor"], received["metadata"])["b"], named[0][1])
    # Not one block, or not as the receiver reads it: copied.
    for other in ([("a", first[:4]), ("c", torch.ones(2))], [("t", first[4:10].view(2, 3).t())]):
        flat, layout = flatten(other)
        assert flat.data_ptr() != first.data_ptr()
        assert all(torch.equal(read(flat, layout)[name], tensor) for name, tensor in other)


def test_a_parcel_keeps_the_bucket_before_and_uses_the_one_before_that_again() -> None:
    parcel = Parcel()
    blocks = [parcel(size, torch.bfloat16) for size in (8, 6, 4, 6, 20)]
    places = [block.data_ptr() for block in blocks]
    assert places[2] == places[0] and places[3] == places[1] and places[4] not in places[:4]
    assert [block.numel() for block in blocks] == [8, 6, 4, 6, 20]

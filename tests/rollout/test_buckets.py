from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_spice.rollout import bucket_loader
from megatron_spice.rollout.buckets import Bucket, Parcel, flatten

MIXED = [
    ("a", torch.arange(3, dtype=torch.bfloat16)),
    ("b", torch.randn(5, 2)),
    ("c", torch.tensor(7, dtype=torch.int64)),
    ("d", torch.randn(4, 6).t()),
]


class Model:
    """Takes weights as an engine's model does, and keeps a copy."""

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in named}


def received(bucket: Bucket) -> dict[str, torch.Tensor]:
    """What a CPU engine loads of it."""
    model = Model()
    bucket_loader.load(model, pickle.loads(base64.b64decode(bucket.serialise())))
    return model.weights


def test_tensors_of_mixed_types_and_strides_come_out_as_they_went_in() -> None:
    bucket = flatten(MIXED)
    found = received(bucket)
    assert list(found) == [name for name, _ in MIXED]
    for name, tensor in MIXED:
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_the_request_holds_handles_and_not_the_weights() -> None:
    bucket = flatten([("w", torch.randn(1000, 1000))])
    assert bucket.flat.is_shared() and len(bucket.serialise()) < 4096


def test_only_memory_that_is_used_again_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, torch.UntypedStorage] = {}
    monkeypatch.setattr(bucket_loader, "_kept", kept)
    received(flatten([("w", torch.ones(8))]))
    assert not kept
    parcel = Parcel()
    for size in (10, 10, 10, 20, 20, 20):  # the parcel outgrows its first blocks
        numbers = parcel(size, torch.float32)
        numbers.fill_(size)
        assert torch.equal(received(flatten([("w", numbers)]))["w"], torch.full((size,), float(size)))
    assert len(kept) == bucket_loader.KEPT and {memory.nbytes() for memory in kept.values()} == {80}


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
    bucket = flatten(named)
    assert bucket.flat.data_ptr() == first.data_ptr() and bucket.flat.is_shared() and bucket.lasting
    assert all(torch.equal(received(bucket)[name], tensor) for name, tensor in named)
    # Not one block, or not as the receiver reads it: copied.
    for other in ([("a", first[:4]), ("c", torch.ones(2))], [("t", first[4:10].view(2, 3).t())]):
        bucket = flatten(other)
        assert bucket.flat.data_ptr() != first.data_ptr() and not bucket.lasting
        assert all(torch.equal(received(bucket)[name], tensor) for name, tensor in other)


def test_a_parcel_keeps_the_bucket_before_and_uses_the_one_before_that_again() -> None:
    parcel = Parcel()
    blocks = [parcel(size, torch.bfloat16) for size in (8, 6, 4, 6, 20)]
    places = [block.data_ptr() for block in blocks]
    assert places[2] == places[0] and places[3] == places[1] and places[4] not in places[:4]
    assert [block.numel() for block in blocks] == [8, 6, 4, 6, 20]


class Linear(torch.nn.Module):
    """A fused projection and an embedding with a padded row, loaded as told."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(4, 6, bias=False)
        self.embed_tokens = torch.nn.Embedding(8, 4)
        self.wrong = wrong

    @torch.no_grad()
    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        weights = dict(named)
        order = "kqv" if self.wrong else "qkv"
        self.qkv_proj.weight.copy_(torch.cat([weights[f"{each}_proj.weight"] for each in order]))
        self.embed_tokens.weight[:7].copy_(weights["embed_tokens.weight"])


@pytest.mark.parametrize("wrong", [False, True])
def test_parameters_that_are_not_what_was_sent_are_named(wrong, capsys):
    """Told by shapes alone, queries and keys in the wrong order would pass."""
    sent = [(f"{each}_proj.weight", torch.randn(2, 4)) for each in "qkv"] + [("embed_tokens.weight", torch.randn(7, 4))]
    handle = pickle.loads(base64.b64decode(flatten([(f"attention.{name}", each) for name, each in sent]).serialise(check=True)))
    model = torch.nn.Module()
    model.attention = Linear(wrong)
    model.load_weights = lambda named: model.attention.load_weights([(name.removeprefix("attention."), t) for name, t in named])
    if wrong:
        with pytest.raises(ValueError, match=r"1 of 2 parameters .*qkv_proj"):
            bucket_loader.load(model, handle)
    else:
        bucket_loader.load(model, handle)
        assert "compared 2 parameters" in capsys.readouterr().out


def test_what_keeps_shared_memory_outlives_signals_to_all_of_a_job():
    """Slurm, a launcher and a terminal send them to every process. The rank itself gets them as before."""
    code = """
import os, signal, time
import psutil, torch
from megatron_spice.cluster.interruption import SIGNALS
from megatron_spice.rollout.buckets import Parcel
got = []
for number in SIGNALS:
    signal.signal(number, lambda number, frame: got.append(number))
parcel = Parcel()
parcel(10, torch.uint8)
[keeper] = psutil.Process().children(recursive=True)
for number in SIGNALS:
    keeper.send_signal(number)
    os.kill(os.getpid(), number)
time.sleep(0.5)
assert keeper.is_running() and keeper.status() != psutil.STATUS_ZOMBIE, keeper
assert sorted(got) == sorted(SIGNALS), got
parcel(1000, torch.uint8)
parcel(1000, torch.uint8)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

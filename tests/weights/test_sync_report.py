from __future__ import annotations

import pytest
import torch

from megatron_spice.weights.sync import SyncReport, copy_rate


def test_a_sync_is_told_against_a_plain_copy() -> None:
    metrics = SyncReport(seconds=0.5, num_bytes=2**30, difference=0.01, copy_rate=4 * 2**30).metrics()
    assert metrics == pytest.approx({
        "sync/gib": 1.0, "sync/push_seconds": 0.5, "sync/gib_per_second": 2.0, "sync/copy_gib_per_second": 4.0,
        "sync/times_a_copy": 2.0, "sync/difference": 0.01,
    })  # fmt: skip


def test_a_plain_copy_has_a_rate() -> None:
    rate = copy_rate(torch.device("cpu"), 2**22)
    assert 2**24 < rate < 2**42

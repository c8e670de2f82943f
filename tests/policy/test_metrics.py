from __future__ import annotations

import pytest
import torch

from megatron_spice.policy.metrics import BIN, BINS, ROLES, SUMS, _add, _p99


def row(drift: torch.Tensor, is_challenger: torch.Tensor) -> dict[str, torch.Tensor]:
    zeros = torch.zeros_like(drift)
    return {
        "loss": torch.tensor(0.0), "entropy": zeros, "clipped": zeros, "dual_clipped": zeros, "capped": zeros,
        "drift": drift, "is_challenger": is_challenger, "is_stale": torch.zeros_like(is_challenger),
    }  # fmt: skip


def test_the_percentile_of_each_roles_drift_is_that_of_its_own_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    drift = {"challenger": torch.rand(5000, generator=generator), "reasoner": 0.1 * torch.rand(3000, generator=generator)}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}
    histograms = torch.zeros(len(ROLES), BINS, dtype=torch.float64)
    for role, values in drift.items():
        for part in values.split(700):
            _add(row(part, torch.full(part.shape, role == "challenger")), sums, histograms)
    for role, histogram in zip(ROLES, histograms):
        assert _p99(histogram) == pytest.approx(drift[role].quantile(0.99).item(), abs=2 * BIN)
    assert _p99(histograms.sum(0)) == pytest.approx(torch.cat(list(drift.values())).quantile(0.99).item(), abs=2 * BIN)


def test_the_last_bin_is_open() -> None:
    histograms = torch.zeros(len(ROLES), BINS, dtype=torch.float64)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}
    _add(row(torch.tensor([1e6, 0.0]), torch.tensor([False, True])), sums, histograms)
    assert _p99(histograms[1]) == pytest.approx(BIN * BINS) and _p99(histograms[0]) == pytest.approx(BIN)

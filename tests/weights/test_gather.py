"""Every rank gets every tensor back whole, in the same order, whatever way Megatron's groups cut the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ranks import run_ranks
from small_models import DENSE, MIXTURE

from megatron_spice.config.layout import ParallelLayout

TIED = dataclasses.replace(DENSE, tied_embeddings=True)
FIVE = dataclasses.replace(DENSE, num_layers=5, tied_embeddings=True)
JOBS = {
    "tensor 4": (DENSE, ParallelLayout((4,), tensor=4)),
    "tensor 2, pipeline 2": (TIED, ParallelLayout((2, 2), tensor=2, pipeline=2)),
    "uneven pipeline": (FIVE, ParallelLayout((1, 1, 2, 1), pipeline=4)),
    "virtual pipeline": (FIVE, ParallelLayout((1, 1, 2, 1), pipeline=2, data=2)),
    "context 2, tensor 2": (DENSE, ParallelLayout((4,), tensor=2, context=2)),
    "expert 2 of 4": (MIXTURE, ParallelLayout((4,), expert=2, data=4)),
    "expert 2 in tensor 2, data 2": (MIXTURE, ParallelLayout((4,), tensor=2, expert=2, data=2)),
    "expert 2, pipeline 2": (MIXTURE, ParallelLayout((2, 2), pipeline=2, expert=2, data=2)),
    "expert 2, virtual pipeline": (MIXTURE, ParallelLayout((1, 1, 1, 1), pipeline=2, expert=2, data=2)),
    "tensor 2, one expert rank": (MIXTURE, ParallelLayout((4,), tensor=2, data=2)),
}


@pytest.fixture(scope="module")
def results():
    ranks = run_ranks(4, Path(__file__).with_name("gather_ranks.py"), "gather", list(JOBS.values()), 10_000)
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(JOBS)}


@pytest.mark.parametrize("name", JOBS)
def test_every_rank_gets_every_tensor(results, name):
    for rank in results[name]:
        assert rank["wrong"] == []
        assert {tensor for bucket in rank["order"] for tensor in bucket} == rank["all"]
        assert rank["order"] == results[name][0]["order"]
        assert len(rank["order"]) > 4, "everything in one bucket tests no order"


def test_a_rank_holds_its_share_of_the_experts(results):
    whole = results["tensor 2, one expert rank"][0]["held"]
    experts = 2 * MIXTURE.num_experts * MIXTURE.num_layers
    assert all(rank["held"] == whole - experts // 2 for rank in results["expert 2 of 4"])

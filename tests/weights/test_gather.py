"""Every rank gets every tensor back whole, in the same order, whatever way Megatron's groups cut the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ranks import run_ranks
from small_models import DENSE, MIXTURE

from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.vocabulary import padded_vocabulary

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


HOSTS = [[0], [0, 2], [3], [1, 2, 3], [0]]
"""Ranks that host an engine; the last ones get the weights of the layers QUANTISED in FP8."""
QUANTISED = [1, 2]


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).with_name("gather_ranks.py")
    ranks = run_ranks(4, script, "gather", list(JOBS.values()), HOSTS, 10_000, QUANTISED)
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(JOBS)}


@pytest.mark.parametrize("name", JOBS)
def test_every_rank_gets_every_tensor(results, name):
    ranks = results[name]
    for rank in ranks:
        found = rank["everyone"]
        assert found["wrong"] == []
        assert {tensor for bucket in found["order"] for tensor in bucket} == rank["all"]
        assert found["order"] == ranks[0]["everyone"]["order"]
        assert len(found["order"]) > 3, "everything in one bucket tests no order"


@pytest.mark.parametrize("case", range(len(HOSTS)))
@pytest.mark.parametrize("name", JOBS)
def test_hosts_get_the_same_and_other_ranks_nothing(results, name, case):
    architecture, layout = JOBS[name]
    # Slices of embedding and output matrix travel with the rows that round the vocabulary up.
    rows = padded_vocabulary(architecture.vocab_size, layout.tensor) - architecture.vocab_size
    padding = 2 * rows * architecture.hidden_size * 4
    for number, rank in enumerate(results[name]):
        found = rank["hosts"][case]
        assert found["wrong"] == []
        if number not in HOSTS[case]:
            assert found["order"] == [] and found["bytes"] == 0
        elif case < len(HOSTS) - 1:
            assert found["order"] == rank["everyone"]["order"]
            assert 0 < found["bytes"] <= rank["everyone"]["bytes"] + padding
        else:
            assert {tensor for bucket in found["order"] for tensor in bucket} == rank["quantised"] > rank["all"]


def test_only_what_is_lacking_travels(results):
    """All of the model but what the host holds, padding apart: nothing twice, and FP8 numbers for what one rank has whole."""
    for name in ("expert 2, pipeline 2", "uneven pipeline"):
        host = results[name][0]
        [whole], [lacking, halved] = {host["everyone"]["bytes"]}, (host["hosts"][case]["bytes"] for case in (0, -1))
        assert lacking == pytest.approx(whole, rel=0.01) and halved < 0.8 * whole


def test_a_rank_holds_its_share_of_the_experts(results):
    whole = results["tensor 2, one expert rank"][0]["held"]
    experts = 2 * MIXTURE.num_experts * MIXTURE.num_layers
    assert all(rank["held"] == whole - experts // 2 for rank in results["expert 2 of 4"])

"""Draws by source: as often as the weights say, and as stateless as the uniform order."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpus import Document, HasHash, make_corpus

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler

SIZES = {"a": 40, "b": 3, "c": 17}  # passages
LONGEST = 4
tables = st.dictionaries(st.sampled_from("abc"), st.floats(1e-3, 1e3), min_size=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Sources in turns, so that their passages are not neighbours."""
    order = sorted((place / size, label) for label, size in SIZES.items() for place in range(size))
    documents = [Document(label, [number]) for number, (_, label) in enumerate(order)]
    return Corpus(make_corpus(tmp_path_factory.mktemp("mixture") / "corpus", documents, longest=LONGEST), HasHash())


def source(corpus: Corpus, index: int) -> str:
    return corpus.passage(index).source


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"c": 1, "b": 2, "a": 7}, {"b": 3}])
def test_sources_are_drawn_as_often_as_weighted_and_evenly_inside(corpus: Corpus, weights: dict[str, float]) -> None:
    count = 6000
    drawn = Counter(PassageSampler(corpus, 5, weights).next_indices(count))
    expected = {
        index: count * weights[label] / sum(weights.values()) / SIZES[label]
        for index in range(len(corpus))
        if (label := source(corpus, index)) in weights
    }
    assert set(drawn) <= set(expected)
    # Chi-square exceeds its mean by 4 standard deviations about once in 10,000.
    excess = sum((drawn[index] - mean) ** 2 / mean for index, mean in expected.items()) - (len(expected) - 1)
    assert excess < 4 * math.sqrt(2 * (len(expected) - 1))


@given(
    weights=st.none() | tables, seed=st.integers(0, 2**64 - 1), calls=st.lists(st.integers(0, 9), max_size=6),
    cut=st.integers(0, 6),
)  # fmt: skip
@settings(max_examples=40)
def test_an_order_goes_on_from_any_cursor(
    corpus: Corpus, weights: dict[str, float] | None, seed: int, calls: list[int], cut: int
) -> None:
    """However the draws are grouped, whoever makes them: they are those of one uninterrupted order."""
    whole = PassageSampler(corpus, seed, weights).next_indices(sum(calls))
    first = PassageSampler(corpus, seed, weights)
    drawn = [index for count in calls[:cut] for index in first.next_indices(count)]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PassageSampler(corpus, seed, weights)
    resumed.load_state_dict(state)
    drawn += [passage.index for count in calls[cut:] for passage in resumed.next(count)]
    assert drawn == whole == [first.index_at(position) for position in range(len(whole))]


@given(weights=tables, factor=st.sampled_from([0.5, 2.0, 1024.0]))
@settings(max_examples=20)
def test_only_the_proportions_count(corpus: Corpus, weights: dict[str, float], factor: float) -> None:
    scaled = {label: weight * factor for label, weight in reversed(weights.items())}
    one, other = PassageSampler(corpus, 1, weights), PassageSampler(corpus, 1, scaled)
    assert one.state_dict() == other.state_dict()
    assert one.next_indices(20) == other.next_indices(20)
    assert math.isclose(sum(one.state_dict()["weights"].values()), 1)


def test_draws_are_fixed_for_ever(corpus: Corpus) -> None:
    drawn = PassageSampler(corpus, 0, {"a": 1, "c": 2.5}).next_indices(12)
    assert drawn == [51, 40, 57, 47, 12, 54, 8, 54, 54, 50, 44, 26]


def test_another_mixture_cannot_be_resumed(corpus: Corpus) -> None:
    state = PassageSampler(corpus, 1, {"a": 1, "b": 1}).state_dict()
    for weights in ({"a": 1, "b": 2}, {"a": 1}, None):
        with pytest.raises(ValueError, match=r"has weights \{'a': 0\.5, 'b': 0\.5\}.*corpus\.weights"):
            PassageSampler(corpus, 1, weights).load_state_dict(state)
    uniform = PassageSampler(corpus, 1)
    uniform.load_state_dict({key: value for key, value in uniform.state_dict().items() if key != "weights"})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "corpus.weights is empty"),
        ({"x": 1}, r"names source x, .* it has: a \(40 passages\), b \(3 passages\), c \(17 passages\)"),
        ({"a": 0.0}, "has 0.0 for a"),
        ({"a": -1.0}, "has -1.0 for a"),
        ({"a": math.nan}, "has nan for a"),
        ({"a": math.inf}, "has inf for a"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(corpus: Corpus, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassageSampler(corpus, 1, weights)


def test_a_wrong_source_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a corpus whose tables are too big to be read at load."""
    monkeypatch.setattr("megatron_spice.corpus.manifest.CHECKED_BYTES", 0)
    folder = make_corpus(tmp_path / "corpus", [Document("ab"[number % 2], [number]) for number in range(6)])
    table = np.load(folder / "sources.npy")
    np.copyto(np.load(folder / "sources.npy", mmap_mode="r+"), table[::-1])
    with pytest.raises(ValueError, match=r"sources\.npy does not match"):
        PassageSampler(Corpus(folder, HasHash()), 1, {"a": 1}).next(1)

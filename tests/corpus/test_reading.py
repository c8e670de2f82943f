"""How a corpus is read: at once however large it is, with few maps, and whole passages only."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from made_corpus import Document, HasHash, huge_corpus, make_corpus, write_absent_shard

from megatron_spice.corpus.corpus import Corpus


def open_maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{folder}/shard_")


def test_a_hundred_thousand_shards_open_in_under_a_second(tmp_path: Path) -> None:
    folder = huge_corpus(tmp_path / "corpus", 100_000)
    write_absent_shard(folder, 77_777)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        corpus = Corpus(folder, HasHash())
        passage = corpus.passage(77_777)
        seconds.append(time.perf_counter() - start)
    assert len(corpus) == 100_000 and passage.document == 77_777 and len(passage.token_ids) == 1000
    assert min(seconds) < 1.0
    assert open_maps(folder) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts maps in /proc")
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_never_more_maps_than_asked(tmp_path: Path, limit: int) -> None:
    folder = make_corpus(tmp_path / "corpus", [Document("a", [number] * 6) for number in range(30)], shard_documents=1)
    corpus = Corpus(folder, HasHash(), open_shards=limit)
    assert open_maps(folder) == 0
    order = list(range(len(corpus))) * 3
    random.Random(0).shuffle(order)
    most = 0
    for index in order:
        assert set(corpus.token_ids(index).tolist()) == {index // 2}
        most = max(most, open_maps(folder))
    assert most == min(limit, 30)
    del corpus
    assert open_maps(folder) == 0


def test_several_passages_come_in_the_order_asked_for(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus", [Document("a", [n] * 6) for n in range(5)]), HasHash())
    assert corpus.passages([7, 0, 7]) == [corpus.passage(7), corpus.passage(0), corpus.passage(7)]
    assert corpus.passages([]) == []
    with pytest.raises(IndexError, match="passage 10 of a corpus of 10"):
        corpus.passages([0, 10])


def test_ids_are_a_read_only_view(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus", [Document("a", [1, 2, 3])]), HasHash())
    ids = corpus.token_ids(0)
    assert ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 9

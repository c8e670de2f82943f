"""Nothing of a corpus can change unnoticed: any flipped bit is found, any cut file is refused when the corpus is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpus import Document, HasHash, everything, huge_corpus, make_corpus, write_absent_shard

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.verify import verify_corpus

FILES = ["manifest.json", "passages.npy", "shards.npy", "sources.npy", "shard_00000.bin", "shard_00001.idx", "shard_00001.bin"]
places = st.fractions(0, 1).filter(lambda share: share < 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [Document("ab"[number % 2], list(range(number, number + 9))) for number in range(6)]
    folder = make_corpus(tmp_path_factory.mktemp("damage") / "corpus", documents)
    assert set(FILES) < {path.name for path in folder.iterdir()}
    return folder


@pytest.fixture
def restored(corpus: Path) -> Iterator[dict[str, bytes]]:
    """The files' contents; they are there again afterwards."""
    contents = {path.name: path.read_bytes() for path in corpus.iterdir()}
    yield contents
    for name, data in contents.items():
        (corpus / name).write_bytes(data)


def found_damaged(corpus: Path) -> list[str]:
    """What opening and reading all passages says, else what `verify_corpus` says."""
    try:
        everything(corpus)
    except ValueError as error:
        return [str(error)]
    return list(verify_corpus(corpus))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(corpus: Path, restored: dict[str, bytes], name: str) -> None:
    @given(place=places)
    @settings(max_examples=60)
    def flipped(place: float) -> None:
        bit = int(place * len(restored[name]) * 8)
        data = bytearray(restored[name])
        data[bit // 8] ^= 1 << bit % 8
        (corpus / name).write_bytes(data)
        (message,) = found_damaged(corpus)
        assert name in message and str(corpus) in message

    flipped()


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_longer_file_is_refused_when_the_corpus_is_opened(
    corpus: Path, restored: dict[str, bytes], name: str
) -> None:
    @given(place=places)
    @settings(max_examples=30)
    def cut(place: float) -> None:
        (corpus / name).write_bytes(restored[name][: int(place * len(restored[name]))])
        with pytest.raises(ValueError, match=name):
            Corpus(corpus, HasHash())

    cut()
    (corpus / name).write_bytes(restored[name] + b"\0")
    with pytest.raises(ValueError, match=name):
        Corpus(corpus, HasHash())


def test_a_flipped_token_is_found_when_it_is_read(corpus: Path, restored: dict[str, bytes]) -> None:
    """Without `verify`, and the passages beside it can be read on."""
    data = bytearray(restored["shard_00001.bin"])
    data[20] ^= 4
    (corpus / "shard_00001.bin").write_bytes(data)
    opened = Corpus(corpus, HasHash())
    broken = []
    for index in range(len(opened)):
        try:
            opened.token_ids(index)
        except ValueError as error:
            broken.append((index, str(error)))
    ((index, message),) = broken
    assert f"passage {index} is damaged" in message and "shard_00001.bin" in message


def test_big_tables_are_not_read_at_load_but_by_verify(
    corpus: Path, restored: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_spice.corpus.manifest.CHECKED_BYTES", 0)
    data = bytearray(restored["passages.npy"])
    data[-1] ^= 1  # the last passage's checksum
    (corpus / "passages.npy").write_bytes(data)
    opened = Corpus(corpus, HasHash())
    with pytest.raises(ValueError, match=f"passage {len(opened) - 1} is damaged"):
        opened.passage(len(opened) - 1)
    with pytest.raises(ValueError, match=r"passages\.npy is damaged"):
        Corpus(corpus, HasHash(), verify=True)


def test_in_a_huge_corpus_a_shard_is_checked_when_it_is_first_read(tmp_path: Path) -> None:
    folder = huge_corpus(tmp_path / "corpus", 5000)
    write_absent_shard(folder, 77)
    opened = Corpus(folder, HasHash())
    assert opened.token_ids(77).tolist() == [0] * 1000
    with pytest.raises(ValueError, match=r"shard_00078\.bin is missing"):
        opened.token_ids(78)
    (folder / "shard_00077.idx").unlink()
    with pytest.raises(ValueError, match=r"shard_00077\.idx is missing"):
        Corpus(folder, HasHash()).token_ids(77)

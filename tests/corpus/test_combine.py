"""Pieces joined by their tables give the corpus that one run over all their documents would have given."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpus import Document, everything, write_part

from megatron_spice.corpus import combine as module
from megatron_spice.corpus.combine import Piece, combine, open_sources
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.passages import open_passages
from megatron_spice.corpus.verify import verify_corpus

documents = st.builds(Document, st.sampled_from("abc"), st.lists(st.integers(0, 59999), max_size=11))
parts_of_documents = st.lists(st.lists(documents, max_size=8), min_size=1, max_size=4).filter(
    lambda parts: any(document.ids for part in parts for document in part)
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def expected(parts: list[list[Document]]) -> list[tuple[str, str, int]]:
    whole = [document for part in parts for document in part]
    return [
        (" ".join(map(str, ids[begin : begin + 4])), source, number)
        for number, (source, ids) in enumerate(whole)
        for begin in range(0, len(ids), 4)
    ]


@given(parts=parts_of_documents, adopt=st.booleans(), block=st.integers(1, 9))
@settings(max_examples=60)
def test_joined_pieces_are_the_corpus_of_all_documents(parts: list[list[Document]], adopt: bool, block: int) -> None:
    with folder() as top, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        pieces = [write_part(top / f"part{number}", part) for number, part in enumerate(parts)]
        (top / "all").mkdir()
        manifest = combine(top / "all", pieces, adopt=adopt)
        manifest.write(top / "all")
        assert everything(top / "all") == expected(parts)
        assert list(verify_corpus(top / "all")) == []
        assert manifest.folders == ([""] if adopt else [f"../part{number}" for number in range(len(parts))])
        assert manifest.documents == sum(map(len, parts)) == sum(source["documents"] for source in manifest.sources)
        assert manifest.tokens == sum(len(document.ids) for part in parts for document in part)
        assert_sources_are_grouped(top / "all", manifest)


def assert_sources_are_grouped(corpus: Path, manifest: Manifest) -> None:
    passages, grouped = open_passages(corpus / "passages.npy"), open_sources(corpus / "sources.npy")
    bounds = np.cumsum([source["passages"] for source in manifest.sources])[:-1]
    for source, numbers in enumerate(np.split(grouped, bounds)):
        assert numbers.tolist() == np.flatnonzero(passages["source"] == source).tolist()


@given(parts=parts_of_documents)
@settings(max_examples=20)
def test_merged_corpora_can_be_merged(parts: list[list[Document]]) -> None:
    """Their folders are seen from the new place."""
    with folder() as top:
        inner = [write_part(top / "deep" / f"part{number}", part) for number, part in enumerate(parts)]
        (top / "deep" / "inner").mkdir()
        combine(top / "deep" / "inner", inner, adopt=False).write(top / "deep" / "inner")
        (top / "outer").mkdir()
        pieces = [Piece.read(top / "deep" / "inner"), inner[0]]
        combine(top / "outer", pieces, adopt=False).write(top / "outer")
        assert everything(top / "outer") == expected([*parts, parts[0]])


def test_an_interrupted_adoption_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [[Document("a", [number] * 5)] * 7 for number in range(3)]
    pieces = [write_part(tmp_path / f"part{number}", part) for number, part in enumerate(parts)]
    (tmp_path / "all").mkdir()
    left, rename = [5], os.rename

    def killed(source: str, target: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            combine(tmp_path / "all", pieces, adopt=True)
        left[0] = 5
    combine(tmp_path / "all", pieces, adopt=True).write(tmp_path / "all")
    assert everything(tmp_path / "all") == expected(parts)


def test_pieces_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first, second = (write_part(tmp_path / name, [Document("a", [1, 2, 3])]) for name in ("one", "two"))
    for name, value in (("tokenizer", {"hash": "x"}), ("dtype", "int32"), ("options", {"max_tokens": 5})):
        other = Piece(second.path, replace(second.manifest, **{name: value}))
        with pytest.raises(ValueError, match=f"one and .*two were made with different {name}"):
            combine(tmp_path, [first, other], adopt=False)
    table = bytearray((second.path / "passages.npy").read_bytes())
    table[-1] ^= 1
    (second.path / "passages.npy").write_bytes(table)
    with pytest.raises(ValueError, match=r"two: passages\.npy is damaged"):
        combine(tmp_path, [first, second], adopt=False)


def test_too_many_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SOURCES", 3)
    pieces = [write_part(tmp_path / name, [Document(name, [1]), Document("b", [1])]) for name in "abcd"]
    combine(tmp_path, pieces[:3], adopt=False)
    with pytest.raises(ValueError, match="more than 3 different `source` labels"):
        combine(tmp_path, pieces, adopt=False)

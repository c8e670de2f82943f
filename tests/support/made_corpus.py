"""Corpora written straight from ids, without tokenizing: small ones for properties, huge ones that are mostly absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_spice.corpus.combine import Piece, combine
from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, passage_checksums
from megatron_spice.corpus.shard_table import SHARD_DTYPE, open_shards, shard_bytes, shard_prefix, write_shards
from megatron_spice.corpus.shards import ShardWriter

DTYPE = np.dtype("uint16")


class Document(NamedTuple):
    source: str
    ids: list[int]


class HasHash:
    """What a corpus asks of a tokenizer."""

    vocab_hash = "the tokenizer's hash"

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def write_part(folder: Path, documents: Sequence[Document], longest: int = 4, shard_documents: int = 3) -> Piece:
    """A piece of these documents, cut every `longest` tokens, with a shard for each `shard_documents` of them."""
    folder.mkdir(parents=True)
    labels = list(dict.fromkeys(document.source for document in documents))
    sources = [{"name": label, "documents": 0, "tokens": 0, "passages": 0} for label in labels]
    table, shards = PassageWriter(folder / PASSAGES_NAME), [np.empty(0, SHARD_DTYPE)]
    for number, begin in enumerate(range(0, len(documents), shard_documents)):
        writer = ShardWriter(shard_prefix(folder, number), DTYPE)
        for document in documents[begin : begin + shard_documents]:
            ids, start = np.array(document.ids, DTYPE), writer.tokens
            offsets = range(0, len(ids), longest)
            lengths = [min(longest, len(ids) - offset) for offset in offsets]
            place, source = writer.add(ids), labels.index(document.source)
            rows = [
                (number, place, start + offset, length, source, checksum)
                for offset, length, checksum in zip(offsets, lengths, passage_checksums(ids, offsets, lengths, start))
            ]
            table.add(np.array(rows, PASSAGE_DTYPE))
            for name, count in (("documents", 1), ("tokens", len(ids)), ("passages", len(rows))):
                sources[source][name] += count
        shards.append(writer.close().row(number))
    return Piece(folder, _described(folder, table, np.concatenate(shards), sources))


def make_corpus(folder: Path, documents: Sequence[Document], **options: int) -> Path:
    """A whole corpus of these documents."""
    part = write_part(folder.with_name(f"{folder.name}-part"), documents, **options)
    folder.mkdir()
    combine(folder, [part], adopt=True).write(folder)
    return folder


def huge_corpus(folder: Path, shards: int, tokens: int = 1000) -> Path:
    """The tables of a corpus of so many shards with one document and passage each, all zeros, and no shard's files."""
    folder.mkdir()
    zeros = np.zeros(tokens, DTYPE)
    passages = np.zeros(shards, PASSAGE_DTYPE)
    passages["shard"], passages["length"] = np.arange(shards), tokens
    passages["checksum"] = passage_checksums(zeros, [0], [tokens], 0)[0]
    table = PassageWriter(folder / PASSAGES_NAME)
    table.add(passages)
    rows = np.zeros(shards, SHARD_DTYPE)
    rows["number"], rows["documents"], rows["tokens"] = np.arange(shards), 1, tokens
    sources = [{"name": "only", "documents": shards, "tokens": shards * tokens, "passages": shards}]
    _described(folder, table, rows, sources)
    return folder


def write_absent_shard(folder: Path, shard: int) -> None:
    """A shard's files in a `huge_corpus`, without taking space on disk."""
    row = open_shards(folder / SHARDS_NAME)[shard]
    for suffix, size in shard_bytes(int(row["documents"]), int(row["tokens"]), DTYPE).items():
        with open(shard_prefix(folder, shard) + suffix, "wb") as file:
            file.truncate(size)


def everything(folder: Path) -> list[tuple[str, str, int]]:
    """Text, source and document of all passages."""
    from megatron_spice.corpus.corpus import Corpus

    corpus = Corpus(folder, HasHash())
    return [(each.text, each.source, each.document) for each in corpus.passages(range(len(corpus)))]


def _described(folder: Path, table: PassageWriter, shards: np.ndarray, sources: list[dict]) -> Manifest:
    totals = {name: sum(source[name] for source in sources) for name in ("documents", "tokens", "passages")}
    manifest = Manifest(
        tokenizer={"hash": HasHash.vocab_hash, "vocab_size": 60000},
        dtype=DTYPE.name,
        shards=len(shards),
        options={"max_tokens": 4},
        sources=sources,
        files={PASSAGES_NAME: table.close(), SHARDS_NAME: write_shards(folder / SHARDS_NAME, shards)},
        inputs=[{"path": folder.name}],
        **totals,
    )
    manifest.write(folder)
    return manifest

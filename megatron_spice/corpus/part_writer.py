"""Writes one part of a corpus: its shards, passage table, shard table and counts, numbered for themselves.

Documents come in blocks and stay in numpy from the encoder to the files. What is done for each document in Python is only
what must be: its checksum, and its cuts where it is longer than a passage may be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_spice.corpus.build_options import BadInput, BuildOptions
from megatron_spice.corpus.combine import MOST_SOURCES
from megatron_spice.corpus.fast_encoder import Encoder
from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, passage_checksums
from megatron_spice.corpus.segment import cut
from megatron_spice.corpus.shard_table import SHARD_DTYPE, shard_prefix, write_shards
from megatron_spice.corpus.shards import ShardWriter, ids_dtype
from megatron_spice.corpus.tokenizer import TextTokenizer


class PartWriter:
    """A part in `folder`, which exists and is empty.

    Attributes:
        documents, tokens, passages: written so far.
        skipped: documents without passage, and whatever the caller counts there, by reason.
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, encoder: Encoder, options: BuildOptions):
        self._folder, self._tokenizer, self._encoder, self._options = folder, tokenizer, encoder, options
        self._dtype = ids_dtype(tokenizer.vocab_size)
        self._table = PassageWriter(folder / PASSAGES_NAME)
        self._shard: ShardWriter | None = None
        self._shards: list[np.ndarray] = []
        self._source_ids: dict[str, int] = {}
        self._by_source = np.zeros((0, 3), dtype=np.int64)  # documents, tokens, passages
        self.skipped: Counter[str] = Counter()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._table.abandon()
        if self._shard is not None:
            self._shard.abandon()

    @property
    def totals(self) -> tuple[int, int, int]:
        """Documents, tokens and passages written so far."""
        documents, tokens, passages = self._by_source.sum(axis=0).tolist()
        return documents, tokens, passages

    def add(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Encode and write a block of documents with their source labels."""
        encoded = self._encoder.encode(texts)
        ids, lengths = encoded.ids.astype(self._dtype), encoded.lengths
        sources = self._numbers(labels)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        while first < len(lengths):
            shard = self._open_shard(int(lengths[first]))
            room = self._options.shard_tokens - shard.tokens
            end = max(first + 1, int(np.searchsorted(bounds, bounds[first] + room, side="right")) - 1)
            part = slice(first, end)
            self._write(shard, texts[part], ids[bounds[first] : bounds[end]], lengths[part], sources[part])
            first = end

    def finish(self, options: dict) -> Manifest:
        """Close all files; the manifest of what they hold, made with `options`."""
        self._close_shard()
        shards = np.concatenate([np.empty(0, SHARD_DTYPE), *self._shards])
        files = {PASSAGES_NAME: self._table.close(), SHARDS_NAME: write_shards(self._folder / SHARDS_NAME, shards)}
        documents, tokens, passages = self.totals
        return Manifest(
            tokenizer={"hash": self._tokenizer.vocab_hash, "vocab_size": self._tokenizer.vocab_size},
            dtype=self._dtype.name,
            documents=documents,
            tokens=tokens,
            passages=passages,
            options=options,
            sources=[
                {"name": label, "documents": counts[0], "tokens": counts[1], "passages": counts[2]}
                for label, counts in zip(self._source_ids, self._by_source.tolist())
            ],
            shards=len(shards),
            files=files,
            skipped={reason: count for reason, count in self.skipped.items() if count},
        )

    def _write(
        self, shard: ShardWriter, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, sources: np.ndarray
    ) -> None:
        """Append documents to a shard, and their passages to the table."""
        offsets = np.cumsum(lengths) - lengths  # of the documents in `ids`
        counts, document, offset, length = self._passages(texts, ids, lengths, offsets)
        base = shard.tokens
        rows = np.empty(len(document), dtype=PASSAGE_DTYPE)
        rows["shard"] = len(self._shards)
        rows["document"] = document + len(shard)
        rows["start"] = base + offset
        rows["length"] = length
        rows["source"] = sources[document]
        rows["checksum"] = passage_checksums(ids, offset.tolist(), length.tolist(), base)
        shard.add_many(ids, lengths)
        self._table.add(rows)
        self.skipped["short_documents"] += int((counts == 0).sum())
        for column, amounts in enumerate((np.ones_like(lengths), lengths, counts)):
            np.add.at(self._by_source[:, column], sources, amounts)

    def _passages(
        self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """(Passages of each document), and of each passage: document, offset in `ids`, length."""
        options = self._options
        counts = ((lengths >= options.min_tokens) & (lengths <= options.max_tokens)).astype(np.int64)
        long = np.flatnonzero(lengths > options.max_tokens)
        cuts = [self._cut(texts[place], ids[offsets[place] : offsets[place] + lengths[place]]) for place in long]
        counts[long] = [len(pieces) for pieces in cuts]
        document = np.repeat(np.arange(len(lengths)), counts)
        offset, length = offsets[document], lengths[document]
        first = np.cumsum(counts) - counts
        for place, pieces in zip(long, cuts):
            rows = slice(first[place], first[place] + len(pieces))
            offset[rows] += pieces[:, 0]
            length[rows] = pieces[:, 1]
        return counts, document, offset, length

    def _cut(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Offset and length of each passage of a long document, [passages, 2]."""
        data, starts = self._tokenizer.to_bytes(ids, text)
        pieces = cut(data, starts, self._options.max_tokens, self._options.min_tokens)
        return np.array(pieces, dtype=np.int64).reshape(-1, 2)

    def _numbers(self, labels: Sequence[str]) -> np.ndarray:
        """Source ids of labels, which are numbered as they come."""
        for label in labels:
            if label not in self._source_ids:
                if len(self._source_ids) >= MOST_SOURCES:
                    raise BadInput(
                        f"more than {MOST_SOURCES} different `source` labels; they are meant for kinds of text, "
                        "not for single documents: give --source NAME to replace them"
                    )
                self._source_ids[label] = len(self._source_ids)
        more = len(self._source_ids) - len(self._by_source)
        self._by_source = np.pad(self._by_source, ((0, more), (0, 0)))
        return np.fromiter(map(self._source_ids.__getitem__, labels), dtype=np.int64, count=len(labels))

    def _open_shard(self, length: int) -> ShardWriter:
        """The shard that takes a document of this length: a new one when the open one would grow past its limit."""
        if self._shard is not None and self._shard.tokens + length > self._options.shard_tokens:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardWriter(shard_prefix(self._folder, len(self._shards)), self._dtype)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close().row(len(self._shards)))
            self._shard = None

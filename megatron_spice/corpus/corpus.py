"""A corpus made by tools/preprocess_corpus.py, as a long list of passages.

Everything is memory-mapped and shards are opened when first read, at most `open_shards` at a time, so neither the size
of the corpus nor the number of its shards costs anything at start. Every passage that is read is verified by its
checksum: damage is an error that names the file, not a strange batch. It costs what fetching the bytes from memory costs,
which whoever uses them next is spared: a passage read and used is ahead of Megatron's IndexedDataset.get, which checks
nothing (tools/benchmark.py passages).
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import PASSAGES_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, open_passages, passage_checksum
from megatron_spice.corpus.shard_files import CHECKED_AT_OPEN, ShardFiles
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.verify import verify_corpus
from megatron_spice.game.records import Passage

_ROW = struct.Struct("<IIQIII")  # PASSAGE_DTYPE; several times faster than numpy for one row
assert _ROW.size == PASSAGE_DTYPE.itemsize


class Corpus:
    """The passages of a corpus folder.

    Args:
        path: the folder.
        tokenizer: the model's; the corpus must have been made with the same.
        open_shards: most shards kept mapped.
        verify: read every file back against its checksum.

    Attributes:
        manifest: what the folder holds.
        fingerprint: equal for corpora with the same passages in the same shards.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: it is damaged, empty, or made with another tokenizer.
    """

    def __init__(
        self, path: str | os.PathLike[str], tokenizer: TextTokenizer, *, open_shards: int = 64, verify: bool = False
    ):
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._check_request(tokenizer)
        self.manifest.check_files(self.path)
        self._shards = ShardFiles(self.path, self.manifest)
        if len(self._shards) <= CHECKED_AT_OPEN:
            for shard in range(len(self._shards)):
                self._shards.check(shard)
        if verify:
            for problem in verify_corpus(self.path):
                raise ValueError(problem)
        self._map = functools.lru_cache(open_shards)(self._shards.map)
        table = open_passages(self.path / PASSAGES_NAME)
        if len(table) != self.manifest.passages:
            raise ValueError(
                f"corpus {self.path}: {PASSAGES_NAME} has {len(table)} rows, the manifest says {self.manifest.passages}; "
                "make or copy the corpus again"
            )
        self._rows = memoryview(table).cast("B")
        self._length = len(table)
        self._first_document = [0, *np.cumsum(self._shards.table["documents"]).tolist()]
        self._sources = [source["name"] for source in self.manifest.sources]
        self._tokenizer = tokenizer
        self.fingerprint: str = self.manifest.files[PASSAGES_NAME]["sha256"]

    def __len__(self) -> int:
        return self._length

    def passage(self, index: int) -> Passage:
        """Passage `index`; its `document` counts through all shards. Raises what `token_ids` does."""
        return self.with_ids(index, self.token_ids(index))

    def with_ids(self, index: int, ids: np.ndarray) -> Passage:
        """Passage `index`, whose ids (`token_ids`) someone has read already."""
        token_ids = tuple(ids.tolist())
        shard, document, _, _, source, _ = _ROW.unpack_from(self._rows, index * _ROW.size)
        return Passage(
            index=int(index),
            document=self._first_document[shard] + document,
            source=self._sources[source],
            token_ids=token_ids,
            text=self._tokenizer.decode(token_ids),
        )

    def passages(self, indices: Iterable[int]) -> list[Passage]:
        """Several passages, in the order asked for."""
        return [self.passage(index) for index in indices]

    def token_ids(self, index: int) -> np.ndarray:
        """The ids of passage `index` alone: a read-only view into the shard's map, [length] of the corpus's dtype.

        Raises:
            IndexError: there is no such passage.
            ValueError: its tokens are not what they were when the corpus was made, or the shard is missing or cut short.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"passage {index} of a corpus of {self._length}")
        shard, _, start, length, _, checksum = _ROW.unpack_from(self._rows, index * _ROW.size)
        ids = self._map(shard)[start : start + length]
        if passage_checksum(ids, start) != checksum or len(ids) != length:
            raise ValueError(
                f"corpus {self.path}: passage {index} is damaged: its tokens in {next(self._shards.files(shard))[0]} do "
                f"not have the checksum that {PASSAGES_NAME} has; make or copy the corpus again "
                "(tools/preprocess_corpus.py verify names every damaged file)"
            )
        return ids

    def source_id(self, index: int) -> int:
        """Place of passage `index`'s source in the manifest, by the passage table alone."""
        return _ROW.unpack_from(self._rows, index * _ROW.size)[4]

    def _check_request(self, tokenizer: TextTokenizer) -> None:
        """That the manifest is one that this model can use."""
        made_with = self.manifest.tokenizer["hash"]
        if made_with != tokenizer.vocab_hash:
            raise ValueError(
                f"corpus {self.path} was made with another tokenizer (hash {made_with[:12]}, the model's is "
                f"{tokenizer.vocab_hash[:12]}); run tools/preprocess_corpus.py with --tokenizer set to the model's folder"
            )
        if self.manifest.passages == 0:
            raise ValueError(f"corpus {self.path} has no passage; make it with a lower --min-tokens or more text")

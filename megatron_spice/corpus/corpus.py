"""A corpus made by tools/preprocess_corpus.py, as a long list of passages.

Everything is memory-mapped and shards are opened when first read, at most `open_shards` at a time, so neither the size
of the corpus nor the number of its shards costs anything at start.

A passage's bytes are copied out of the map and verified by their checksum before anyone sees them: what was verified is
what is used, and no reader keeps a map open. That the copy is small and warm makes it cheaper than a view into the map.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, Manifest, check_size
from megatron_spice.corpus.passages import PASSAGE_DTYPE, open_passages, passage_checksum
from megatron_spice.corpus.shard_table import open_shards, shard_bytes, shard_prefix
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.verify import verify_corpus
from megatron_spice.game.records import Passage

# Sizes of so many shards' files are looked at when the corpus is opened, of more when each is first read.
CHECKED_SHARDS = 4096
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
        if self.manifest.tokenizer["hash"] != tokenizer.vocab_hash:
            raise ValueError(
                f"corpus {self.path} was made with another tokenizer (hash {self.manifest.tokenizer['hash'][:12]}, the "
                f"model's is {tokenizer.vocab_hash[:12]}); run tools/preprocess_corpus.py with --tokenizer set to the "
                "model's folder"
            )
        if self.manifest.passages == 0:
            raise ValueError(f"corpus {self.path} has no passage; make it with a lower --min-tokens or more text")
        self._tokenizer = tokenizer
        self._dtype = np.dtype(self.manifest.dtype)
        self._shards = _ShardMaps(self.path, self.manifest, open_shards)
        self._rows = memoryview(_passages(self.path, self.manifest)).cast("B")
        self._first_document = [0, *np.cumsum(self._shards.table["documents"]).tolist()]
        self._sources = [source["name"] for source in self.manifest.sources]
        self.fingerprint: str = self.manifest.files[PASSAGES_NAME]["sha256"]
        if verify:
            for problem in verify_corpus(self.path):
                raise ValueError(problem)

    def __len__(self) -> int:
        return self.manifest.passages

    def passage(self, index: int) -> Passage:
        """Passage `index`; its `document` counts through all shards. Raises what `token_ids` does."""
        ids, shard, document, source = self._read(index)
        token_ids = tuple(ids.tolist())
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
        """The ids of passage `index` alone, read-only [length] of the corpus's dtype.

        Raises:
            IndexError: there is no such passage.
            ValueError: its tokens are not what they were when the corpus was made, or a shard is missing or cut short.
        """
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[np.ndarray, int, int, int]:
        """Ids, shard, document in the shard and source id of a passage."""
        if not 0 <= index < self.manifest.passages:
            raise IndexError(f"passage {index} of a corpus of {len(self)}")
        shard, document, start, length, source, checksum = _ROW.unpack_from(self._rows, index * _ROW.size)
        size = self._dtype.itemsize
        data = self._shards.get(shard)[start * size : (start + length) * size]
        if passage_checksum(data, start) != checksum or len(data) != length * size:
            raise ValueError(
                f"corpus {self.path}: passage {index} is damaged: its tokens in {self._shards.name(shard)}.bin do not have "
                f"the checksum that {PASSAGES_NAME} has; copy the corpus or make it anew "
                "(tools/preprocess_corpus.py verify names every damaged file)"
            )
        return np.frombuffer(data, self._dtype), shard, document, source


class _ShardMaps:
    """The .bin files of a corpus as memory maps, the ones used last kept open."""

    def __init__(self, path: Path, manifest: Manifest, limit: int):
        self.table = _shards(path, manifest)
        self._path, self._folders, self._limit = path, manifest.folders, limit
        self._dtype = np.dtype(manifest.dtype)
        self._open: OrderedDict[int, mmap.mmap | bytes] = OrderedDict()
        if len(self.table) <= CHECKED_SHARDS:
            for shard in range(len(self.table)):
                self._check(shard)

    def name(self, shard: int) -> str:
        """The shard's files without suffix, as seen from the corpus folder."""
        row = self.table[shard]
        return str(shard_prefix(Path(self._folders[row["folder"]]), row["number"]))

    def get(self, shard: int) -> mmap.mmap | bytes:
        """The bytes of a shard's .bin."""
        data = self._open.get(shard)
        if data is None:
            data = self._map(shard)
        self._open.move_to_end(shard)
        return data

    def _map(self, shard: int) -> mmap.mmap | bytes:
        if shard >= len(self.table):
            raise ValueError(f"corpus {self._path}: {PASSAGES_NAME} names shard {shard} of {len(self.table)}; it is damaged")
        self._check(shard)
        if len(self._open) >= self._limit:
            closed = self._open.popitem(last=False)[1]
            if isinstance(closed, mmap.mmap):
                closed.close()
        with open(self._path / f"{self.name(shard)}.bin", "rb") as file:
            # An empty file cannot be mapped.
            empty = self.table[shard]["tokens"] == 0
            self._open[shard] = data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data

    def _check(self, shard: int) -> None:
        """Raises ValueError when a file of the shard is missing or not of its size."""
        row = self.table[shard]
        for suffix, size in shard_bytes(int(row["documents"]), int(row["tokens"]), self._dtype).items():
            check_size(self._path, self._path / f"{self.name(shard)}{suffix}", size)


def _shards(path: Path, manifest: Manifest) -> np.ndarray:
    """The shard table, checked as far as a load checks."""
    manifest.check_files(path)
    table = open_shards(path / SHARDS_NAME)
    _check_rows(path, SHARDS_NAME, len(table), manifest.shards)
    if len(table) and table["folder"].max() >= len(manifest.folders):
        raise ValueError(f"corpus {path}: {SHARDS_NAME} names folders that the manifest does not; it is damaged")
    return table


def _passages(path: Path, manifest: Manifest) -> np.ndarray:
    table = open_passages(path / PASSAGES_NAME)
    _check_rows(path, PASSAGES_NAME, len(table), manifest.passages)
    return table


def _check_rows(path: Path, name: str, rows: int, expected: int) -> None:
    if rows != expected:
        raise ValueError(f"corpus {path}: {name} has {rows} rows, the manifest says {expected}; copy or make it anew")

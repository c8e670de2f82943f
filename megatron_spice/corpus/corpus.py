"""A corpus made by tools/preprocess_corpus.py, as a long list of passages.

Everything is memory-mapped and shards are opened when first read, at most `open_shards` at a time, so neither the size
of the corpus nor the number of its shards costs anything at start.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import PASSAGES_NAME, Manifest
from megatron_spice.corpus.passages import open_passages
from megatron_spice.corpus.shards import ShardReader
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.game.records import Passage


class Corpus:
    """The passages of a corpus folder.

    Args:
        path: the folder.
        tokenizer: the model's; the corpus must have been made with the same.
        open_shards: most shards kept mapped.
        verify: read every file back against its checksum.

    Attributes:
        manifest: what the folder holds.
        fingerprint: equal for corpora with the same passages in the same order.

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
        if verify:
            self.manifest.check_contents(self.path)
        else:
            self.manifest.check_sizes(self.path)
        self._tokenizer = tokenizer
        self._table = open_passages(self.path / PASSAGES_NAME)
        if len(self._table) == 0:
            raise ValueError(f"corpus {self.path} has no passage; make it with a lower --min-tokens or more text")
        self._first_document = np.cumsum([0] + [shard["documents"] for shard in self.manifest.shards])
        self._sources = [source["name"] for source in self.manifest.sources]
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._open_shards = open_shards
        self.fingerprint: str = self.manifest.files[PASSAGES_NAME]["sha256"]

    def __len__(self) -> int:
        return len(self._table)

    def passage(self, index: int) -> Passage:
        """Passage `index`; its `document` counts through all shards.

        Raises:
            IndexError: there is no such passage.
            ValueError: the table points outside its shard.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"passage {index} of a corpus of {len(self)}")
        shard, document, offset, length, source = self._table[index].tolist()
        ids = self._shard(shard).document(document)[offset : offset + length]
        if len(ids) != length:
            raise ValueError(f"corpus {self.path}: passage {index} reaches past its document; make the corpus again")
        token_ids = tuple(ids.tolist())
        return Passage(
            index=int(index),
            document=int(self._first_document[shard]) + document,
            source=self._sources[source],
            token_ids=token_ids,
            text=self._tokenizer.decode(token_ids),
        )

    def _shard(self, number: int) -> ShardReader:
        reader = self._open.get(number)
        if reader is None:
            reader = ShardReader(self.path / self.manifest.shards[number]["name"])
            if len(self._open) >= self._open_shards:
                self._open.popitem(last=False)
            self._open[number] = reader
        self._open.move_to_end(number)
        return reader

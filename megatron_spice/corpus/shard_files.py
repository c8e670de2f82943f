"""The shards of a corpus folder as the shard table describes them: their names, whether they are whole, their tokens.

A shard costs one memory map and no .idx: the passage table says where a passage's tokens are. Sizes follow from the table, so
a cut or foreign file is noticed without reading it: in corpora of usual size when the corpus is opened, in those of more than
`CHECKED_AT_OPEN` shards when a shard is first read (asking a parallel file system for 200,000 sizes takes minutes).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import SHARDS_NAME, Manifest, check_size
from megatron_spice.corpus.shard_table import open_shards, shard_bytes, shard_prefix

CHECKED_AT_OPEN = 4096


class ShardFiles:
    """The shard table of a corpus folder and the files it stands for.

    Attributes:
        table: [shards] of `SHARD_DTYPE`.

    Raises:
        ValueError: the table is not the manifest's.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.table = open_shards(folder / SHARDS_NAME)
        self._folder, self._folders, self._dtype = folder, manifest.folders, np.dtype(manifest.dtype)
        if len(self.table) != manifest.shards:
            raise ValueError(
                f"corpus {folder}: {SHARDS_NAME} has {len(self.table)} rows, the manifest says {manifest.shards}; "
                "make or copy the corpus again"
            )
        if len(self.table) and self.table["folder"].max() >= len(manifest.folders):
            raise ValueError(f"corpus {folder}: {SHARDS_NAME} names folders that the manifest lacks; make or copy it again")

    def __len__(self) -> int:
        return len(self.table)

    def files(self, shard: int) -> Iterator[tuple[str, int, str]]:
        """Name (as seen from the corpus folder), size and hexadecimal SHA-256 of both files."""
        folder, number, documents, tokens, *digests = self.table[shard].tolist()
        prefix = shard_prefix(self._folders[folder], number)
        for (suffix, size), digest in zip(shard_bytes(documents, tokens, self._dtype).items(), digests):
            yield prefix + suffix, size, digest.hex()

    def check(self, shard: int) -> None:
        """Raises ValueError when a file of the shard is missing or not of its size."""
        for name, size, _ in self.files(shard):
            check_size(self._folder, name, size)

    def map(self, shard: int) -> np.ndarray:
        """The shard's tokens, [tokens] of the corpus's dtype; the file stays mapped as long as the array or a view lives.

        Raises:
            ValueError: there is no such shard, or a file of it is missing or not of its size.
        """
        if shard >= len(self):
            raise ValueError(f"corpus {self._folder} has {len(self)} shards, its passage table names shard {shard}")
        self.check(shard)
        name, size, _ = next(self.files(shard))
        if size == 0:  # cannot be mapped
            return np.empty(0, self._dtype)
        with open(self._folder / name, "rb") as file:
            # A plain array over the map: slicing a numpy.memmap is several times slower.
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self._dtype)

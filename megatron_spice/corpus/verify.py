"""Reads a corpus back: every file against the checksum that was taken when it was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import SHARDS_NAME, Manifest, check_size, damaged, sha256
from megatron_spice.corpus.shard_table import open_shards, shard_bytes, shard_prefix


def verify_corpus(folder: Path) -> Iterator[str]:
    """A message for each damaged file of the corpus.

    Raises:
        FileNotFoundError, ValueError: there is no manifest or shard table that could say what the files should be.
    """
    manifest = Manifest.read(folder)
    for name, expected in manifest.files.items():
        yield from _problems(folder, name, expected["bytes"], expected["sha256"])
    dtype = np.dtype(manifest.dtype)
    for row in open_shards(folder / SHARDS_NAME):
        prefix = shard_prefix(Path(manifest.folders[row["folder"]]), row["number"])
        sizes = shard_bytes(int(row["documents"]), int(row["tokens"]), dtype)
        yield from _problems(folder, f"{prefix}.bin", sizes[".bin"], row["bin_sha256"].tobytes().hex())
        yield from _problems(folder, f"{prefix}.idx", sizes[".idx"], row["idx_sha256"].tobytes().hex())


def _problems(folder: Path, name: str, size: int, digest: str) -> Iterator[str]:
    try:
        check_size(folder, folder / name, size)
    except ValueError as error:
        yield str(error)
        return
    if sha256(folder / name) != digest:
        yield damaged(folder, name)

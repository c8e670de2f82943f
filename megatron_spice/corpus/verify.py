"""Reads a corpus back: every file against the checksum that was taken when it was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_spice.corpus.manifest import Manifest, check_size, damaged, sha256
from megatron_spice.corpus.shard_files import ShardFiles


def verify_corpus(folder: Path) -> Iterator[str]:
    """A message for each damaged file of the corpus.

    Raises:
        FileNotFoundError, ValueError: there is no manifest or shard table that could say what the files should be.
    """
    manifest = Manifest.read(folder)
    for name, expected in manifest.files.items():
        yield from _problems(folder, name, expected["bytes"], expected["sha256"])
    shards = ShardFiles(folder, manifest)
    for shard in range(len(shards)):
        for name, size, digest in shards.files(shard):
            yield from _problems(folder, name, size, digest)


def _problems(folder: Path, name: str, size: int, digest: str) -> Iterator[str]:
    try:
        check_size(folder, name, size)
    except ValueError as error:
        yield str(error)
        return
    if sha256(folder / name) != digest:
        yield damaged(folder, name)

"""Reads a corpus back: every file against the checksum that was taken when it was written.

Files are read side by side; the hash lets go of the interpreter, so threads are enough to keep disk and cores busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_spice.corpus.manifest import Manifest, check_size, damaged, sha256
from megatron_spice.corpus.shard_files import ShardFiles


class ExpectedFile(NamedTuple):
    """A file of a corpus as it was written; `name` as seen from the corpus folder."""

    name: str
    bytes: int
    sha256: str


def expected_files(folder: Path) -> list[ExpectedFile]:
    """All files of a corpus but its manifest, which vouches for itself.

    Raises:
        FileNotFoundError, ValueError: there is no manifest or shard table that could say which they are.
    """
    manifest = Manifest.read(folder)
    shards = ShardFiles(folder, manifest)
    tables = [ExpectedFile(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.files.items()]
    return tables + [ExpectedFile(*entry) for shard in range(len(shards)) for entry in shards.files(shard)]


def verify_corpus(
    folder: Path, *, workers: int = 1, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """A message for each damaged file of the corpus, in the order of `expected_files`.

    Args:
        workers: files read at a time.
        on_bytes: called with the bytes that were read since it was last called, by several threads.

    Raises:
        FileNotFoundError, ValueError: as `expected_files`.
    """
    files = expected_files(folder)
    with ThreadPoolExecutor(workers) as threads:
        for problem in threads.map(partial(_problem, folder, on_bytes=on_bytes), files):
            if problem is not None:
                yield problem


def _problem(folder: Path, file: ExpectedFile, on_bytes: Callable[[int], None]) -> str | None:
    try:
        check_size(folder, file.name, file.bytes)
        digest = sha256(folder / file.name, on_bytes)
    except ValueError as error:
        return str(error)
    except OSError as error:  # such as the disk's own read errors
        return f"corpus {folder}: {file.name} cannot be read: {error}"
    return None if digest == file.sha256 else damaged(folder, file.name)

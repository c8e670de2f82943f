"""manifest.json: what a corpus folder holds, how it was made, and what its files must look like to be believed.

It is written last, so a folder with a manifest is a whole one. It vouches for the tables (bytes and SHA-256), the tables
for the shards (shard_table.py) and for every passage (passages.py), and its own last line vouches for itself. What grows
with the number of documents or shards is in the tables: the manifest is parsed at every start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "manifest.json"
PASSAGES_NAME = "passages.npy"
SHARDS_NAME = "shards.npy"
SOURCES_NAME = "sources.npy"
FORMAT = 2

# A corpus's tables are a few MB: read back at every load. Those of a huge one are not; `verify` reads them.
CHECKED_BYTES = 64 << 20


@dataclass(frozen=True)
class Manifest:
    """A corpus folder described.

    Attributes:
        tokenizer: `hash` (see `TextTokenizer.vocab_hash`) and `vocab_size`.
        dtype: numpy name of the ids' type.
        documents, tokens, passages, shards: totals; `tokens` counts documents, not passages.
        options: `max_tokens` and `min_tokens` that passages were cut with, `shard_tokens` that shards are closed at.
        sources: label, documents, tokens and passages by source id.
        files: `bytes` and `sha256` by name of what lies in the folder besides shards.
        folders: where shards lie, relative to the corpus folder; "" is the folder itself.
        inputs: path, bytes and modification time of what was read.
        skipped: lines and documents left out, by reason.
        command: the command line that made it.
        task: [i, n] when only the i-th of n runs of the inputs is in it, and the others are in corpora of their own.
    """

    tokenizer: dict
    dtype: str
    documents: int
    tokens: int
    passages: int
    shards: int
    options: dict
    sources: list[dict]
    files: dict[str, dict]
    folders: list[str] = field(default_factory=lambda: [""])
    inputs: list[dict] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    task: list[int] | None = None
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder, on disk."""
        text = json.dumps(dataclasses.asdict(self), indent=1).removesuffix("\n}")
        with open(folder / FILE_NAME, "wb") as file:
            file.write(_sealed(text.encode("ascii")))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a corpus folder.

        Raises:
            FileNotFoundError: the folder or its manifest is missing.
            ValueError: the manifest is damaged or of another format.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            state = f"{folder} has no {FILE_NAME}" if folder.is_dir() else f"no corpus at {folder}"
            raise FileNotFoundError(f"{state}; make it with tools/preprocess_corpus.py ... --output {folder}")
        data = path.read_bytes()
        if _sealed(data.rpartition(_SEAL)[0]) != data:
            raise ValueError(_why_not(path, data))
        content = json.loads(data)
        del content["sha256"]
        if content["format"] != FORMAT:
            raise ValueError(_why_not(path, data))
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path} cannot be read: made by another version ({error}); make the corpus again") from error

    def check_files(self, folder: Path) -> None:
        """Raises ValueError naming the first table that is missing, not of its size or, if small, not of its checksum."""
        for name, expected in self.files.items():
            check_size(folder, name, expected["bytes"])
            if expected["bytes"] <= CHECKED_BYTES and sha256(folder / name) != expected["sha256"]:
                raise ValueError(damaged(folder, name))


def check_size(folder: Path, name: str, expected: int) -> None:
    """Raises ValueError when file `name` of the corpus in `folder` is missing or not of its size."""
    try:
        size = os.stat(os.path.join(folder, name)).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"corpus {folder}: {name} is missing; make or copy the corpus again") from None
    if size != expected:
        raise ValueError(
            f"corpus {folder}: {name} has {size} bytes, expected {expected}: cut short or not of this corpus; "
            "make or copy the corpus again"
        )


def damaged(folder: Path, name: str) -> str:
    """What to say of a file whose checksum differs."""
    return f"corpus {folder}: {name} is damaged (its checksum differs); make or copy the corpus again"


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks; `on_bytes` hears of the size of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


_SEAL = b',\n "sha256": "'


def _sealed(data: bytes) -> bytes:
    """The file of a JSON object that lacks its closing brace: with its own checksum as the last key."""
    return data + _SEAL + hashlib.sha256(data).hexdigest().encode() + b'"\n}\n'


def _why_not(path: Path, data: bytes) -> str:
    """What is wrong with a manifest that this version does not read."""
    try:
        content = json.loads(data)
        found, command = content["format"], shlex.join(content.get("command", []))
    except (ValueError, KeyError, TypeError):
        return f"{path} cannot be read: it is no manifest, or damaged; make or copy the corpus again"
    if found == FORMAT:
        return f"{path} cannot be read: its checksum differs, it is damaged or was edited; make or copy the corpus again"
    version = "an earlier" if found == 1 else "another"
    again = f"with: {command}" if command else "with tools/preprocess_corpus.py"
    return f"{path} cannot be read: made by {version} version (format {found}); make the corpus again {again}"

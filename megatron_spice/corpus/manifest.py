"""manifest.json: what a corpus folder holds, how it was made, and what its files must look like to be believed.

It is written last, so a folder with a manifest is a whole one; sizes are checked at every load, checksums on demand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "manifest.json"
PASSAGES_NAME = "passages.npy"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """A corpus folder described.

    Attributes:
        tokenizer: `hash` (see `TextTokenizer.vocab_hash`) and `vocab_size`.
        dtype: numpy name of the ids' type.
        documents, tokens, passages: totals; `tokens` counts documents, not passages.
        options: `max_tokens` and `min_tokens` that passages were cut with, `shard_tokens` that shards are closed at.
        sources: label, documents, tokens and passages by source id.
        shards: `name`, `documents` and `tokens` by shard number.
        files: `bytes` and `sha256` by file name.
        inputs: path, bytes and modification time of what was read.
        skipped: lines and documents left out, by reason.
        command: the command line that made it.
    """

    tokenizer: dict
    dtype: str
    documents: int
    tokens: int
    passages: int
    options: dict
    sources: list[dict]
    shards: list[dict]
    files: dict[str, dict]
    inputs: list[dict] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder, on disk."""
        with open(folder / FILE_NAME, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a corpus folder.

        Raises:
            FileNotFoundError: the folder or its manifest is missing.
            ValueError: the manifest is broken or of another format.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            state = f"{folder} has no {FILE_NAME}" if folder.is_dir() else f"no corpus at {folder}"
            raise FileNotFoundError(f"{state}; make it with tools/preprocess_corpus.py ... --output {folder}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; make the corpus again") from error

    def check_sizes(self, folder: Path) -> None:
        """Raises ValueError naming the first file that is missing or not of its size."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"corpus {folder}: {name} is missing; make the corpus again")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise ValueError(
                    f"corpus {folder}: {name} has {size} bytes, its manifest says {expected['bytes']}: "
                    "cut short or not of this corpus; make the corpus again or copy it anew"
                )

    def check_contents(self, folder: Path) -> None:
        """Reads every file back; raises ValueError naming the first whose checksum differs."""
        self.check_sizes(folder)
        for name, expected in self.files.items():
            if sha256(folder / name) != expected["sha256"]:
                raise ValueError(f"corpus {folder}: {name} is damaged (its checksum differs); copy or make it anew")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Documents left out by stages, on record: one JSON object a line, compressed, in the order of the inputs."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

from megatron_spice.corpus.documents import Document
from megatron_spice.corpus.stages.options import Removal

FILE_NAME = "removed.jsonl.gz"


class Removed:
    """Writes what is removed of one part; there is a file only when something was. Files end to end are one again."""

    def __init__(self, folder: Path):
        self._path = folder / FILE_NAME
        self._stream: gzip.GzipFile | None = None
        self.counts: Counter[str] = Counter()

    def add(self, document: Document, removal: Removal) -> None:
        if self._stream is None:
            # Neither name nor time, so that the same removals are the same bytes.
            self._stream = gzip.GzipFile("", "wb", 6, open(self._path, "wb"), mtime=0)  # noqa: SIM115
        self.counts[removal.reason] += 1
        self._stream.write(json.dumps(removal.record(document)).encode() + b"\n")

    def close(self) -> None:
        if self._stream is not None:
            raw = self._stream.fileobj
            self._stream.close()
            raw.close()
            self._stream = None

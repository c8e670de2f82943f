"""What worker processes do for deduplication: judge and sign units, match buckets, collect the duplicates.

Run by `make_parts` (workers.py), as the parts of a corpus are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spice.corpus.documents import ReadOptions
from megatron_spice.corpus.stages import exact
from megatron_spice.corpus.stages.judge import Judge
from megatron_spice.corpus.stages.options import StageOptions
from megatron_spice.corpus.stages.records import DUPLICATE_DTYPE, UnitRecord, write_duplicates
from megatron_spice.corpus.units import Unit, read_unit

_COUNTED = 64  # documents between two counts


@contextmanager
def _watched(check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` twice a second meanwhile: datatrove's steps do not ask whether anybody still waits for them."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            check()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class UnitJudge:
    """Judges the documents of units, and writes the signatures of those that stay, then the record that it is done."""

    options: StageOptions
    folder: Path
    units: Sequence[Unit]
    reading: ReadOptions
    strict: bool
    judge: Judge

    def make(self, number: int, counts: np.ndarray, check: Callable[[], None]) -> None:
        before = int(counts[0])
        record = UnitRecord(self.units[number])
        documents = read_unit(self.units[number], self._bad, self.reading)

        def staying() -> Iterator[str]:
            for place, document in enumerate(documents):
                if place % _COUNTED == 0:
                    counts[0] = before + documents.disk_bytes
                removal = self.judge.why_not(document.text)
                record.add(document, removal)
                yield document.text if removal is None and document.text.strip() else ""

        with _watched(check):
            if self.options.dedup == "exact":
                exact.write_hashes(staying(), number, self.folder)
            else:
                from megatron_spice.corpus.stages import minhash

                minhash.write_signatures(staying(), number, self.folder)
            record.write(number, self.folder)
        counts[0] = before + self.units[number].disk_bytes

    def _bad(self, path: str, line: int, reason: str) -> None:
        if self.strict:
            raise ValueError(f"{path}:{line}: {reason}")


@dataclass(frozen=True)
class BucketMatcher:
    """Finds the pairs of documents that agree in a bucket."""

    units: int
    folder: Path

    def make(self, number: int, counts: np.ndarray, check: Callable[[], None]) -> None:
        from megatron_spice.corpus.stages import minhash

        with _watched(check):
            minhash.match_bucket(number, self.units, self.folder)
        counts[0] += 1


@dataclass(frozen=True)
class DuplicateFinder:
    """Collects the duplicates and sorts them by unit, in a process of its own: 16 bytes each are in memory here."""

    options: StageOptions
    folder: Path
    units: int

    def make(self, number: int, counts: np.ndarray, check: Callable[[], None]) -> None:
        if self.options.dedup == "exact":
            found = exact.find_duplicates(self.units, self.folder)
        else:
            from megatron_spice.corpus.stages import minhash

            found = minhash.cluster(self.folder)
        with _watched(check):
            rows = np.concatenate([np.empty(0, DUPLICATE_DTYPE), *found])
        rows.sort(order=["unit", "document"])
        edges = np.flatnonzero(np.diff(rows["unit"])) + 1
        for part in np.split(rows, edges):
            if len(part):
                write_duplicates(int(part["unit"][0]), self.folder, part)

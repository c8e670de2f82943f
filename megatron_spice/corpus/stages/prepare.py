"""What has to be known of the whole corpus before the first document is kept: the benchmarks' index, the duplicates.

Order: language, filters and benchmarks judge each document alone; duplicates are looked for among those that are left,
so the one that is kept of a cluster is one that stays. With deduplication every text is therefore read and judged here,
once, and the build reads the verdicts; without it the build's workers judge as they read.

Each unit is a job of its own whose result appears on disk when it is complete, so what is interrupted goes on there.
The folder belongs to one request: the caller sees to it that inputs and options are those it was begun with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from megatron_spice.corpus.documents import Document, ReadOptions
from megatron_spice.corpus.stages import exact
from megatron_spice.corpus.stages.judge import Judge
from megatron_spice.corpus.stages.options import Removal, StageOptions
from megatron_spice.corpus.stages.pool import in_processes
from megatron_spice.corpus.stages.records import DUPLICATE_DTYPE, UnitRecord, is_judged, read_removals, write_duplicates
from megatron_spice.corpus.units import Unit, read_unit

DUPLICATE = {"exact": "duplicate", "minhash": "near-duplicate"}
_DONE = "duplicates/done"


@dataclass(frozen=True)
class Prepared:
    """What workers need to make their Stages. Picklable."""

    options: StageOptions
    folder: Path

    @property
    def recorded(self) -> bool:
        """Whether all verdicts are on disk already."""
        return self.options.dedup is not None


class Stages:
    """A worker's view: why does a document go? Documents are to be asked about once each, all of a unit, in order."""

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._judge = None if prepared.recorded else Judge(prepared.options, prepared.folder)
        self._removals: dict[int, Removal] = {}
        self._documents = self._asked = 0

    def begin(self, unit_number: int) -> None:
        """Go on with the unit of this number in the list that was prepared."""
        self._asked = 0
        if self._judge is None:
            reason = DUPLICATE[self._prepared.options.dedup]
            self._documents, self._removals = read_removals(unit_number, self._prepared.folder, reason)

    def why_not(self, document: Document) -> Removal | None:
        """Why the document goes; None: it stays."""
        if self._judge is not None:
            return self._judge.why_not(document.text)
        assert self._asked < self._documents, "a unit gives more documents than when it was judged"
        self._asked += 1
        return self._removals.get(self._asked - 1)


def prepare(
    units: Sequence[Unit],
    options: StageOptions,
    folder: Path,
    workers: int,
    *,
    read_options: ReadOptions = ReadOptions(),
    strict: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Do the steps that need the whole corpus; what a former call in the same folder has finished is not done again.

    Args:
        workers: processes; with one, the work is done in this one.
        on_progress: called with the name of the step, jobs done and jobs in all.
        say: called with what the user should know of benchmark items that cannot be looked for.

    Raises:
        ValueError: options that the stages cannot follow, or (strict) a broken line.
    """
    options.check_installed()
    for name in ("judged", "duplicates"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    prepared = Prepared(options, folder)
    if options.decontaminate:
        from megatron_spice.corpus.stages.decontaminate import build_index

        build_index(options.decontaminate, options.ngram, folder, say)
    if options.dedup is None:
        Judge(options, folder)  # wrong languages are told here
    elif not (folder / _DONE).is_file():
        todo = [(number, unit) for number, unit in enumerate(units) if not is_judged(number, folder)]
        job = partial(_judge_unit, prepared, read_options, strict)
        for done, _ in enumerate(in_processes(job, todo, workers), 1 + len(units) - len(todo)):
            on_progress("signatures", done, len(units))
        _record(_duplicates(prepared, len(units), workers, on_progress), folder)
        (folder / _DONE).touch()
    return prepared


@lru_cache(1)
def _judge_of(prepared: Prepared) -> Judge:
    """This process's judge: models and indexes are loaded once."""
    return Judge(prepared.options, prepared.folder)


def _judge_unit(prepared: Prepared, read_options: ReadOptions, strict: bool, job: tuple[int, Unit]) -> None:
    """Judge the unit's documents and write the signatures of those that stay, then the record that it is done."""
    number, unit = job
    judge = _judge_of(prepared)
    record = UnitRecord(unit)

    def bad(path: str, line: int, reason: str) -> None:
        if strict:
            raise ValueError(f"{path}:{line}: {reason}")

    def staying() -> Iterator[str]:
        for document in read_unit(unit, bad, read_options):
            removal = judge.why_not(document.text)
            record.add(document, removal)
            yield document.text if removal is None and document.text.strip() else ""

    if prepared.options.dedup == "exact":
        exact.write_hashes(staying(), number, prepared.folder)
    else:
        from megatron_spice.corpus.stages import minhash

        minhash.write_signatures(staying(), number, prepared.folder)
    record.write(number, prepared.folder)


def _duplicates(
    prepared: Prepared, units: int, workers: int, on_progress: Callable[[str, int, int], None]
) -> Iterator[np.ndarray]:
    if prepared.options.dedup == "exact":
        yield from exact.find_duplicates(units, prepared.folder)
        return
    from megatron_spice.corpus.stages import minhash

    job = partial(minhash.match_bucket, units=units, folder=prepared.folder)
    for done, _ in enumerate(in_processes(job, range(minhash.BUCKETS), workers), 1):
        on_progress("buckets", done, minhash.BUCKETS)
    yield from minhash.cluster(prepared.folder)


def _record(found: Iterator[np.ndarray], folder: Path) -> None:
    """Sort the duplicates by unit. They are few beside the documents: 16 bytes each are in memory here."""
    rows = np.concatenate([np.empty(0, DUPLICATE_DTYPE), *found])
    rows.sort(order=["unit", "document"])
    edges = np.flatnonzero(np.diff(rows["unit"])) + 1
    for part in np.split(rows, edges):
        if len(part):
            write_duplicates(int(part["unit"][0]), folder, part)

"""What has to be known of the whole corpus before the first document is kept: the benchmarks' index, the duplicates.

Order: language, filters and benchmarks judge each document alone; duplicates are looked for among those that are left,
so the one that is kept of a cluster is one that stays. With deduplication every text is therefore read and judged here,
once, and the build reads the verdicts; without it the build's workers judge as they read.

Each unit is a job of its own whose result appears on disk when it is complete, so what is interrupted goes on there.
The folder belongs to one request: the caller sees to it that inputs and options are those it was begun with.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.corpus.documents import Document, ReadOptions
from megatron_spice.corpus.stages.jobs import BucketMatcher, DuplicateFinder, UnitJudge
from megatron_spice.corpus.stages.judge import Judge
from megatron_spice.corpus.stages.options import Removal, StageOptions
from megatron_spice.corpus.stages.records import is_judged, read_removals
from megatron_spice.corpus.units import Unit
from megatron_spice.corpus.workers import make_parts

DUPLICATE = {"exact": "duplicate", "minhash": "near-duplicate"}
_DONE = "duplicates/done"


class NotAllJudged(Exception):
    """Units of other tasks are missing, without which duplicates cannot be looked for. What was done is kept."""


@dataclass(frozen=True)
class Prepared:
    """What workers need to make their Stages. Picklable."""

    options: StageOptions
    folder: Path
    first: int = 0  # number of the caller's first unit among all

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
        """Go on with the unit of this number, from `Prepared.first` on."""
        self._asked = 0
        if self._judge is None:
            reason = DUPLICATE[self._prepared.options.dedup]
            self._documents, self._removals = read_removals(
                self._prepared.first + unit_number, self._prepared.folder, reason
            )

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
    mine: range | None = None,
    reading: ReadOptions = ReadOptions(),
    strict: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Do the steps that need the whole corpus; what a former call in the same folder has finished is not done again.

    Args:
        units: of the whole corpus.
        mine: the numbers of those that this run judges and builds, if others, in the same folder, do the rest.
        on_progress: called several times a second with the name of a step, what is done of it and all of it: bytes of
            the inputs, then steps.
        say: called with what the user should know of benchmark items that cannot be looked for.

    Raises:
        ValueError: options that the stages cannot follow, or (strict) a broken line.
        OSError, WorkerLost: as `make_parts`.
        NotAllJudged: others have not judged their units yet.
    """
    mine = range(len(units)) if mine is None else mine
    options.check_installed()
    for name in ("judged", "duplicates"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    prepared = Prepared(options, folder, mine.start)
    if options.decontaminate:
        from megatron_spice.corpus.stages.decontaminate import build_index

        build_index(options.decontaminate, options.ngram, folder, say)
    if options.dedup is None:
        Judge(options, folder)  # wrong languages are told here, and what workers share is loaded before they are forked
    elif not (folder / _DONE).is_file():
        _judge(options, folder, units, mine, reading, strict, workers, on_progress)
        judged = sum(is_judged(number, folder) for number in range(len(units)))
        if judged < len(units):
            raise NotAllJudged(f"{judged} of {len(units)} units are judged")
        _find_duplicates(options, folder, len(units), workers, on_progress)
    return prepared


def _judge(
    options: StageOptions,
    folder: Path,
    units: Sequence[Unit],
    mine: range,
    reading: ReadOptions,
    strict: bool,
    workers: int,
    on_progress: Callable[[str, int, int], None],
) -> None:
    missing = [number for number in mine if not is_judged(number, folder)]
    total = sum(units[number].disk_bytes for number in mine)
    before = total - sum(units[number].disk_bytes for number in missing)
    if options.dedup == "minhash":
        from megatron_spice.corpus.stages import minhash  # noqa: F401 (before the fork: once for all workers)
    judges = UnitJudge(options, folder, units, reading, strict, Judge(options, folder))
    for _ in make_parts(
        judges, missing, workers, 1, lambda counts: on_progress("duplicates, 1 of 2", before + int(counts[0]), total)
    ):
        pass


def _find_duplicates(
    options: StageOptions, folder: Path, units: int, workers: int, on_progress: Callable[[str, int, int], None]
) -> None:
    """Once all units are judged. Of several tasks that come here one does it, the others wait."""
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _DONE).is_file():
            return
        if options.dedup == "minhash":
            from megatron_spice.corpus.stages.minhash import BUCKETS

            for _ in make_parts(
                BucketMatcher(units, folder), range(BUCKETS), workers, 1,
                lambda counts: on_progress("duplicates, 2 of 2", int(counts[0]), BUCKETS),
            ):  # fmt: skip
                pass
        for _ in make_parts(DuplicateFinder(options, folder, units), [0], 1, 1, lambda counts: None):
            (folder / _DONE).touch()

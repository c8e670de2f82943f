"""What deduplication leaves on disk for the build: for each unit, which of its documents go, and why.

    judged/000012.jsonl        a line a document that went before duplicates were looked for; the first line counts all
    judged/000012.places.npy   where each document stands, to name one that is kept
    judged/000012.unit         the unit itself (pickle): the files that those places are in
    duplicates/000012.npy      the documents that are duplicates, and of which

A unit's `.jsonl` is written last and renamed into place: where it is, the unit is done.
"""

from __future__ import annotations

import json
import os
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_spice.corpus.documents import Document, line_in_file
from megatron_spice.corpus.stages.options import Removal
from megatron_spice.corpus.units import Unit

DUPLICATE_DTYPE = np.dtype([("unit", "<u4"), ("document", "<u4"), ("kept_unit", "<u4"), ("kept_document", "<u4")])
PLACE_DTYPE = np.dtype([("span", "<u4"), ("number", "<u8")])


class UnitRecord:
    """Collects a unit's removals and places while it is read."""

    def __init__(self, unit: Unit):
        self._unit = unit
        self._spans = {id(span): place for place, span in enumerate(unit.spans)}
        self._places: list[tuple[int, int]] = []
        self._removals: list[dict] = []

    def add(self, document: Document, removal: Removal | None) -> None:
        if removal is not None:
            entry = {"document": len(self._places), "reason": removal.reason, "detail": removal.detail}
            self._removals.append(entry)
        self._places.append((self._spans[id(document.span)], document.number))

    def write(self, number: int, folder: Path) -> None:
        np.save(_judged(folder, number, ".places.npy"), np.array(self._places, dtype=PLACE_DTYPE))
        _judged(folder, number, ".unit").write_bytes(pickle.dumps(self._unit))
        lines = [{"documents": len(self._places)}, *self._removals]
        partial = _judged(folder, number, ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(partial, _judged(folder, number, ".jsonl"))


def is_judged(number: int, folder: Path) -> bool:
    return _judged(folder, number, ".jsonl").is_file()


def write_duplicates(number: int, folder: Path, rows: np.ndarray) -> None:
    np.save(folder / "duplicates" / f"{number:06d}.npy", rows)


def read_removals(number: int, folder: Path, reason: str) -> tuple[int, dict[int, Removal]]:
    """(documents of the unit, number of a document in it -> why it goes); duplicates go for `reason`."""
    lines = _judged(folder, number, ".jsonl").read_text().splitlines()
    count, *entries = map(json.loads, lines)
    removals = {entry["document"]: Removal(entry["reason"], entry["detail"]) for entry in entries}
    path = folder / "duplicates" / f"{number:06d}.npy"
    if path.is_file():
        for _, document, kept_unit, kept_document in np.load(path).tolist():
            removals[document] = Removal(reason, f"of {_place(folder, kept_unit, kept_document)}")
    return count["documents"], removals


def _place(folder: Path, number: int, document: int) -> str:
    unit, places = _places(folder, number)
    span = unit.spans[places[document]["span"]]
    return f"{span.file.path}:{line_in_file(span, int(places[document]['number']))}"


@lru_cache(64)
def _places(folder: Path, number: int) -> tuple[Unit, np.ndarray]:
    unit = pickle.loads(_judged(folder, number, ".unit").read_bytes())
    return unit, np.load(_judged(folder, number, ".places.npy"), mmap_mode="r")


def _judged(folder: Path, number: int, suffix: str) -> Path:
    return folder / "judged" / f"{number:06d}{suffix}"

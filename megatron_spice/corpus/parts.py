"""The parts of a corpus being made: what one is made of, and how it is made.

A part is what one worker makes of one unit of the inputs (units.py). Which parts there are follows from the inputs alone, so
any number of workers makes the same corpus, and a run that was interrupted finds the parts that it had finished. A part is made
in a folder of another name and renamed when it is whole and on disk.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spice.corpus.bad_lines import BadLines
from megatron_spice.corpus.build_options import BuildOptions
from megatron_spice.corpus.fast_encoder import Encoder
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.manifest import FILE_NAME
from megatron_spice.corpus.part_writer import PartWriter
from megatron_spice.corpus.removed import Removed
from megatron_spice.corpus.stages.preparation import Prepared, Stages
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.units import Document, ReadOptions, Unit, read_unit, split_into_units

BLOCK_BYTES = 4 << 20
BLOCK_DOCUMENTS = 4096
SMALLEST_UNIT, LARGEST_UNIT = 8 << 20, 256 << 20
_SAMPLED_INPUTS, _SAMPLE_CHARACTERS = 8, 32_000
_UNITS = 64  # as many as keep the cores of a large machine busy, where the sizes above allow it

COUNTS = ("disk_bytes", "text_bytes", "documents", "tokens", "passages")
"""What workers count as they go, one i64 each: input read, text in it, and what came of it."""


def deal(inputs: Sequence[InputFile], options: ReadOptions) -> list[Unit]:
    """The units of the inputs, in order.

    Raises:
        ValueError: a file cannot be used at all.
    """
    total = sum(file.path.stat().st_size for file in inputs)
    return split_into_units(inputs, min(max(total // _UNITS, SMALLEST_UNIT), LARGEST_UNIT), options)


def share_of(units: int, task: tuple[int, int]) -> range:
    """Which of so many units are those of `task` (i, n): the i-th of n runs of them."""
    number, tasks = task
    return range(units * number // tasks, units * (number + 1) // tasks)


def first_texts(inputs: Sequence[InputFile], options: ReadOptions) -> list[str]:
    """Some texts from the start of some inputs, spread over all: a sample to try an encoder on."""
    texts: list[str] = []
    for file in inputs[:: max(len(inputs) // _SAMPLED_INPUTS, 1)][:_SAMPLED_INPUTS]:
        units = split_into_units([file], LARGEST_UNIT, options)
        with suppress(_Enough):
            size = 0
            for document in read_unit(units[0], _Patience(), options) if units else ():
                texts.append(document.text[:_SAMPLE_CHARACTERS])
                size += len(texts[-1]) + 1
                if size >= _SAMPLE_CHARACTERS:
                    break
    return texts


class _Enough(Exception):
    """There is nothing to sample in a file."""


class _Patience:
    """Takes the broken lines that a sample meets; they are told of when their part is made. A file of nothing else is left."""

    left = 1000

    def __call__(self, path: str, line: int, reason: str) -> None:
        self.left -= 1
        if not self.left:
            raise _Enough


@dataclass(frozen=True)
class PartMaker:
    """Makes the parts of one corpus; workers are forked with it, so nothing of it is copied or sent."""

    folder: Path
    units: Sequence[Unit]
    tokenizer: TextTokenizer
    encoder: Encoder
    options: BuildOptions
    reading: ReadOptions
    strict: bool = False
    stages: Prepared | None = None

    def path(self, number: int) -> Path:
        """Where the part is when it is finished."""
        return self.folder / f"part_{number:05d}"

    def is_finished(self, number: int) -> bool:
        return (self.path(number) / FILE_NAME).is_file()

    def make(self, number: int, counts: np.ndarray, check: Callable[[], None] = lambda: None) -> None:
        """Make a part.

        Args:
            counts: i64 in the order of `COUNTS`, added to as the work goes on.
            check: called before each block; may raise to give up.
        """
        folder = self.path(number).with_suffix(".unfinished")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        before = counts.copy()
        bad = BadLines(folder, self.strict)
        documents = read_unit(self.units[number], bad, self.reading)
        removed = Removed(folder)
        staying = _staying(documents, self.stages, number, removed) if self.stages else documents
        with closing(removed), PartWriter(folder, self.tokenizer, self.encoder, self.options) as writer:
            text_bytes = 0
            for texts, labels in _blocks(staying, writer):
                check()
                writer.add(texts, labels)
                text_bytes += sum(len(text.encode()) for text in texts)
                counts[:] = before + np.array([documents.disk_bytes, text_bytes, *writer.totals])
            bad.finish()
            writer.skipped["bad_lines"] += bad.count
            writer.skipped.update(removed.counts)
            manifest = writer.finish(self.described)
        counts[0] = before[0] + self.units[number].disk_bytes
        manifest.write(folder)
        os.rename(folder, self.path(number))

    @property
    def described(self) -> dict:
        """The options as manifests keep them."""
        return {**dataclasses.asdict(self.options), **dataclasses.asdict(self.reading)}


def _staying(documents: Iterable[Document], prepared: Prepared, number: int, removed: Removed) -> Iterator[Document]:
    """The documents that the stages leave in; the others are put on record."""
    stages = None
    for document in documents:
        if stages is None:  # not where there are none: such a unit may be no unit of the inputs
            stages = Stages(prepared)
            stages.begin(number)
        removal = stages.why_not(document)
        if removal is None:
            yield document
        else:
            removed.add(document, removal)


def _blocks(documents: Iterable[Document], writer: PartWriter) -> Iterator[tuple[list[str], list[str]]]:
    """Texts and source labels in blocks of bounded size."""
    texts: list[str] = []
    labels: list[str] = []
    size = 0
    for document in documents:
        text = document.text
        if not text or text.isspace():
            writer.skipped["empty_documents"] += 1
            continue
        texts.append(text)
        labels.append(document.source)
        size += len(text)
        if size >= BLOCK_BYTES or len(texts) >= BLOCK_DOCUMENTS:
            yield texts, labels
            texts, labels, size = [], [], 0
    if texts:
        yield texts, labels

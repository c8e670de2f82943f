"""Units of work: the input files as pieces of about one size, each to be read by one worker.

Which pieces there are depends on the inputs and the target alone, never on the number of workers, so a run that is
interrupted finds its finished pieces again, and its output is the same on any machine. Consecutive small files share a
unit; JSON lines are cut at line ends, Parquet at row groups, Arrow at record batches; compressed files and texts stay
whole, since nobody can begin in their middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_spice.corpus.documents import (
    Bad,
    Document,
    InputChanged,
    Progress,
    ReadOptions,
    Span,
    line_in_file,
)
from megatron_spice.corpus.formats import ARROW, JSON_LINES, PARQUET, TEXT, format_of
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers import jsonl, text


@dataclass(frozen=True)
class Unit:
    """Spans of files, read one after the other. Picklable."""

    spans: tuple[Span, ...]

    @property
    def disk_bytes(self) -> int:
        return sum(span.disk_bytes for span in self.spans)


def split_into_units(
    files: Sequence[InputFile], target_bytes: int, options: ReadOptions = ReadOptions()
) -> list[Unit]:
    """Deal the files, in order, into units of at most `target_bytes` where their formats let them be cut.

    Raises:
        ValueError: a file cannot be used at all (no such column, not the format of its name); names the file.
    """
    assert target_bytes > 0
    units: list[Unit] = []
    open_unit: list[Span] = []
    size = 0
    for file in files:
        for span in _reader(file).split(file, target_bytes, options):
            if open_unit and size + span.disk_bytes > target_bytes:
                units.append(Unit(tuple(open_unit)))
                open_unit, size = [], 0
            open_unit.append(span)
            size += span.disk_bytes
    if open_unit:
        units.append(Unit(tuple(open_unit)))
    return units


class UnitReader:
    """The documents of a unit, in order; `disk_bytes` tells at any time how much of the unit's files is read."""

    def __init__(self, unit: Unit, bad: Bad, options: ReadOptions):
        self._progress = Progress()
        self._documents = self._read(unit, bad, options)

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def __next__(self) -> Document:
        return next(self._documents)

    @property
    def disk_bytes(self) -> int:
        return self._progress.disk_bytes

    def _read(self, unit: Unit, bad: Bad, options: ReadOptions) -> Iterator[Document]:
        for span in unit.spans:

            def bad_here(number: int, reason: str, span: Span = span) -> None:
                span.check_unchanged()  # the change may be what broke the line
                bad(str(span.file.path), line_in_file(span, number), reason)

            span.check_unchanged()
            yield from _reader(span.file).read(span, options, bad_here, self._progress)
            span.check_unchanged()
            self._progress.done += span.disk_bytes


def read_unit(unit: Unit, bad: Bad, options: ReadOptions = ReadOptions()) -> UnitReader:
    """Stream the unit's documents in bounded memory; `bad(path, line, reason)` is told of each line or row left out.

    Raises:
        InputChanged: a file is not as it was when the units were made.
    """
    return UnitReader(unit, bad, options)


def _reader(file: InputFile):
    """The module of `readers` for the file; pyarrow is loaded only where it is needed."""
    kind = format_of(file.path)
    if kind == JSON_LINES:
        return jsonl
    if kind == TEXT:
        return text
    if kind == PARQUET:
        from megatron_spice.corpus.readers import parquet

        return parquet
    assert kind == ARROW, f"{file.path} has passed find_inputs, yet is of no known kind"
    from megatron_spice.corpus.readers import arrow

    return arrow


__all__ = ["Document", "InputChanged", "ReadOptions", "Span", "Unit", "UnitReader", "read_unit", "split_into_units"]

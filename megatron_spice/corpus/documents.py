"""What reading gives and what it works on: documents, spans of files, and how to report what is broken.

A span is a part of a file that can be read on its own: bytes for lines and Arrow messages, row groups for Parquet. It
remembers the file's size and time of change, so that a file that changes during a run of days ends the run instead of
giving a corpus that no manifest describes. Documents count from 1 in their span; the number in the file costs a scan of
what stands before the span, so it is made only when somebody is told of the document (a broken line, a removal).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_spice.corpus.inputs import InputFile

Bad = Callable[[str, int, str], None]  # path, line or row (from 1), reason
BadHere = Callable[[int, str], None]  # the same inside a span: line or row of the span, reason


class InputChanged(ValueError):
    """An input file is not the one that the run began with."""


@dataclass(frozen=True)
class ReadOptions:
    """Under which keys (JSON) or columns (Parquet, Arrow) the text stands and, if there, its source.

    `longest` limits, in bytes, a JSON line or a row (longer ones are left out) and a document of plain text (cut up).
    """

    text_key: str = "text"
    source_key: str = "source"
    longest: int = 32 << 20

    def __post_init__(self) -> None:
        if not self.text_key or self.text_key == self.source_key:
            raise ValueError(
                f"--text-key {self.text_key!r} and --source-key {self.source_key!r}: the first must not be empty, "
                "nor equal to the second"
            )


@dataclass(frozen=True)
class Span:
    """A part of a file. `first` is the number of its first line or row, None where that is not known without a scan."""

    file: InputFile
    start: int
    stop: int
    disk_bytes: int
    stamp: tuple[int, int]  # size and time of change, in nanoseconds
    first: int | None = 1

    def check_unchanged(self) -> None:
        try:
            now = stamp_of(self.file)
        except FileNotFoundError:
            raise InputChanged(f"{self.file.path} is gone since the run began; put it back or start anew") from None
        if now != self.stamp:
            raise InputChanged(
                f"{self.file.path} was changed while it was read ({self.stamp[0]} bytes before, {now[0]} now); "
                "start anew when it is complete"
            )


@dataclass(slots=True)
class Document:
    """One text. `source` is its label in the corpus, `number` its line or row in the span, from 1."""

    text: str
    source: str
    span: Span
    number: int

    @property
    def path(self) -> str:
        return str(self.span.file.path)

    @property
    def line(self) -> int:
        """The line (or row) of its file, from 1."""
        return line_in_file(self.span, self.number)


@dataclass
class Progress:
    """How much of the input is read: `done` of the spans before, `tell()` of the present one."""

    done: int = 0
    tell: Callable[[], int] = field(default=lambda: 0)

    @property
    def disk_bytes(self) -> int:
        return self.done + self.tell()


def stamp_of(file: InputFile) -> tuple[int, int]:
    status = file.path.stat()
    return status.st_size, status.st_mtime_ns


def line_in_file(span: Span, number: int) -> int:
    """The number in the file of line `number` of the span."""
    first = span.first if span.first is not None else 1 + _newlines_before(span)
    return first + number - 1


# (Offsets, newlines before them) of each file, ascending: a process reads a file at most once for all that is asked.
_counted: dict[tuple, tuple[list[int], list[int]]] = {}
_BLOCK = 1 << 20


def _newlines_before(span: Span) -> int:
    path, offset = span.file.path, span.start
    offsets, counts = _counted.setdefault((str(path), span.stamp), ([0], [0]))
    place = bisect_right(offsets, offset) - 1
    at, count = offsets[place], counts[place]
    if at == offset:
        return count
    with open(path, "rb", buffering=0) as stream:
        stream.seek(at)
        while at < offset and (block := stream.read(min(_BLOCK, offset - at))):
            count += block.count(b"\n")
            at += len(block)
    offsets.insert(place + 1, offset)
    counts.insert(place + 1, count)
    return count

"""Arrow: the stream format (what Hugging Face `datasets` saves) and the file format, one record batch at a time.

The file is mapped: a batch costs its pages only while it is read, however large it is. The price is that a file which
another program cuts short meanwhile ends the process (SIGBUS) instead of raising.
A span of a stream is the bytes of some messages, so reading begins right there; where a column is a dictionary, whose
values stand in earlier messages, the stream is one span. A span of the file format is a range of batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.types as types

from megatron_spice.corpus.documents import BadHere, Document, Progress, ReadOptions, Span, stamp_of
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers.columns import documents, needed_columns

_MAGIC = b"ARROW1"


def split(file: InputFile, target_bytes: int, options: ReadOptions) -> list[Span]:
    stamp = stamp_of(file)
    try:
        with pa.memory_map(str(file.path)) as source:
            places, rows, sizes = _batches_of_file(source) if _is_file(source) else _batches_of_stream(source)
            needed_columns(_schema(source), file, options)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{file.path} cannot be read as Arrow; leave it out or fetch it again: {error}") from None
    spans: list[Span] = []
    start, first = 0, 1
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > target_bytes:
            spans.append(Span(file, places[start], places[stop], sum(sizes[start:stop]), stamp, first))
            first += sum(rows[start:stop])
            start = stop
    return spans


def read(span: Span, options: ReadOptions, bad: BadHere, progress: Progress) -> Iterator[Document]:
    before = 0
    with pa.memory_map(str(span.file.path)) as source:
        names = needed_columns(_schema(source), span.file, options)
        batches = _read_file(source, span, progress) if _is_file(source) else _read_stream(source, span, progress)
        try:
            for batch in batches:
                yield from documents(batch, names, span, before, bad, options.longest)
                before += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            bad(before + 1, f"the file is damaged from here on: {error}")
        progress.tell = lambda: 0


def _is_file(source: pa.MemoryMappedFile) -> bool:
    source.seek(0)
    magic = source.read(len(_MAGIC))
    source.seek(0)
    return magic == _MAGIC


def _schema(source: pa.MemoryMappedFile) -> pa.Schema:
    return pa.ipc.open_file(source).schema if _is_file(source) else pa.ipc.open_stream(source).schema


def _has_dictionaries(schema: pa.Schema) -> bool:
    def inside(kind: pa.DataType) -> bool:
        return types.is_dictionary(kind) or any(inside(kind.field(place).type) for place in range(kind.num_fields))

    return any(inside(field.type) for field in schema)


def _batches_of_stream(source: pa.MemoryMappedFile) -> tuple[list[int], list[int], list[int]]:
    """Where the batches begin (and the last ends), their rows and their bytes. Bodies are mapped and not looked at."""
    reader = pa.ipc.open_stream(source)
    places, rows = [source.tell()], []
    for batch in reader:
        places.append(source.tell())
        rows.append(batch.num_rows)
    if _has_dictionaries(reader.schema):
        places, rows = [places[0], places[-1]], [sum(rows)]
    return places, rows, [stop - start for start, stop in zip(places, places[1:])]


def _batches_of_file(source: pa.MemoryMappedFile) -> tuple[list[int], list[int], list[int]]:
    reader = pa.ipc.open_file(source)
    batches = range(reader.num_record_batches)
    rows = [reader.get_batch(index).num_rows for index in batches]
    return list(range(len(batches) + 1)), rows, [source.size() // max(len(batches), 1)] * len(batches)


def _read_stream(source: pa.MemoryMappedFile, span: Span, progress: Progress) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_stream(source)
    progress.tell = lambda: max(min(source.tell(), span.stop) - span.start, 0)
    if _has_dictionaries(reader.schema):
        yield from reader
        return
    source.seek(span.start)
    while source.tell() < span.stop:
        yield pa.ipc.read_record_batch(pa.ipc.read_message(source), reader.schema)


def _read_file(source: pa.MemoryMappedFile, span: Span, progress: Progress) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(source)
    index = span.start
    progress.tell = lambda: span.disk_bytes * (index - span.start) // (span.stop - span.start)
    for index in range(span.start, span.stop):
        yield reader.get_batch(index)

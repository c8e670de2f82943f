"""Parquet: only the columns needed, a few hundred rows at a time, through a small buffer. A span is some row groups.

A row group may be gigabytes, so its pages are read as they are decoded instead of at once; that asks the disk for
smaller pieces than pyarrow's own read-ahead, which does not matter where encoding the text is the slower half.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_spice.corpus.documents import BadHere, Document, Progress, ReadOptions, Span, stamp_of
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers.columns import documents, needed_columns

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256  # also where rows are said to be tiny: one value may stand for every row of a dictionary page
_BUFFER = 1 << 20


def split(file: InputFile, target_bytes: int, options: ReadOptions) -> list[Span]:
    stamp = stamp_of(file)
    try:
        with pq.ParquetFile(file.path) as parquet:
            names = needed_columns(parquet.schema_arrow, file, options)
            groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
            sizes = [_disk_bytes(group, names) for group in groups]
            rows = [group.num_rows for group in groups]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} cannot be read as Parquet; leave it out or fetch it again: {error}") from None
    spans: list[Span] = []
    start, first = 0, 1
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > target_bytes:
            spans.append(Span(file, start, stop, sum(sizes[start:stop]), stamp, first))
            first += sum(rows[start:stop])
            start = stop
    return spans


def _disk_bytes(group: pq.RowGroupMetaData, names: list[str]) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(column.total_compressed_size for column in columns if column.path_in_schema in names)


def read(span: Span, options: ReadOptions, bad: BadHere, progress: Progress) -> Iterator[Document]:
    with pq.ParquetFile(span.file.path, buffer_size=_BUFFER, page_checksum_verification=True) as parquet:
        names = needed_columns(parquet.schema_arrow, span.file, options)
        before = 0  # rows of the span before this row group
        total = sum(parquet.metadata.row_group(index).num_rows for index in range(span.start, span.stop))
        progress.tell = lambda: span.disk_bytes * done // max(total, 1)
        done = 0
        for index in range(span.start, span.stop):
            group = parquet.metadata.row_group(index)
            done = before
            try:
                for batch in parquet.iter_batches(_batch_rows(group), [index], names, use_threads=False):
                    yield from documents(batch, names, span, done, bad, options.longest)
                    done += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                bad(done + 1, f"row group {index} is damaged from here on: {error}")
            before += group.num_rows
        progress.tell = lambda: 0


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))

"""Bytes of a file, decompressed on the way, one block at a time.

Both decompressors stand for a file object that gives as many bytes as are asked for, so a file of kilobytes that
unpacks to terabytes takes time, never memory; both go on over several members or frames, and both raise when the file
ends before its stream does (which libraries for .zst like to take for the end).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_spice.corpus.documents import Progress, Span, stamp_of
from megatron_spice.corpus.formats import split_name
from megatron_spice.corpus.inputs import InputFile


@contextmanager
def open_stream(span: Span, progress: Progress) -> Iterator[IO[bytes]]:
    """The span's bytes from `span.start` on; the progress follows the position in the file itself."""
    with open(span.file.path, "rb") as raw:
        raw.seek(span.start)
        progress.tell = lambda: min(raw.tell() - span.start, span.disk_bytes)
        yield decompressed(raw, span.file.path)
        progress.tell = lambda: 0


def decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    compression = split_name(path)[2]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".zst":
        from backports import zstd

        return zstd.ZstdFile(raw)
    return raw


def damage() -> tuple[type[Exception], ...]:
    """What the decompressors raise when the compressed bytes are not whole."""
    from backports import zstd

    return EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError


def why_damaged(error: Exception) -> str:
    """What to say of a stream that ends in such an error."""
    if "too much memory" in str(error):
        return "compressed with a window of over 128 MiB (zstd --long), which takes as much memory: pack it again"
    return f"the compressed file is damaged from here on: {error}"


def whole_file(file: InputFile) -> list[Span]:
    """The file as one span; none when it is empty."""
    stamp = stamp_of(file)
    return [Span(file, 0, stamp[0], stamp[0], stamp)] if stamp[0] else []

"""Plain text: a file is one document; one longer than the limit is cut into several, at a blank line or line's end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_spice.corpus.documents import BadHere, Document, Progress, ReadOptions, Span
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers.streams import damage, open_stream, whole_file

_BLOCK = 4 << 20


def split(file: InputFile, target_bytes: int, options: ReadOptions) -> list[Span]:
    return whole_file(file)


def read(span: Span, options: ReadOptions, bad: BadHere, progress: Progress) -> Iterator[Document]:
    line = 1
    with open_stream(span, progress) as stream:
        rest = bytearray()
        more = True
        while more or rest:
            while more and len(rest) < options.longest:
                try:
                    block = stream.read(_BLOCK)
                except damage() as error:
                    bad(line + rest.count(b"\n"), f"the compressed file is damaged from here on: {error}")
                    return
                rest += block
                more = bool(block)
            piece = bytes(rest if not more else rest[: _end_of_piece(rest[:options.longest])])
            del rest[: len(piece)]
            try:
                if piece:
                    yield Document(piece.decode("utf-8-sig"), span.file.source, span, line)
            except UnicodeDecodeError as error:
                bad(line + piece.count(b"\n", 0, error.start), f"not UTF-8 (byte {error.start} of the text)")
            line += piece.count(b"\n")


def _end_of_piece(data: bytes) -> int:
    """Where to end a document in `data`: after the last blank line, else line, else space, else whole character."""
    for pattern in (b"\n\n", b"\n", b" "):
        place = data.rfind(pattern)
        if place > 0:
            return place + len(pattern)
    broken = re.search(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z", data[-4:])
    return len(data) - 4 + broken.start() if broken and len(data) > 4 else len(data)

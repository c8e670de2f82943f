"""Plain text: a file is one document; one longer than the limit is cut into several, at a blank line or line's end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_spice.corpus.documents import BadHere, Document, Progress, ReadOptions, Span
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers.streams import damage, open_stream, whole_file, why_damaged

_BLOCK = 4 << 20


def split(file: InputFile, target_bytes: int, options: ReadOptions) -> list[Span]:
    return whole_file(file)


def read(span: Span, options: ReadOptions, bad: BadHere, progress: Progress) -> Iterator[Document]:
    line, encoding = 1, "utf-8-sig"
    with open_stream(span, progress) as stream:
        rest = bytearray()
        more = True
        while more or rest:
            while more and len(rest) < options.longest:
                try:
                    block = stream.read(_BLOCK)
                except damage() as error:
                    bad(line + rest.count(b"\n"), why_damaged(error))
                    return
                rest += block
                more = bool(block)
            piece = bytes(rest[: _end_of_piece(rest, options.longest)] if more else rest)
            del rest[: len(piece)]
            try:
                if piece:
                    yield Document(piece.decode(encoding), span.file.source, span, line)
            except UnicodeDecodeError as error:
                bad(line + piece.count(b"\n", 0, error.start), f"not UTF-8 (byte {error.start} of the text)")
            line, encoding = line + piece.count(b"\n"), "utf-8"


def _end_of_piece(data: bytearray, most: int) -> int:
    """Where to end a document of at most `most` bytes: after the last blank line, else line, space, whole character."""
    end = min(most, len(data))
    for pattern in (b"\n\n", b"\n", b" "):
        place = data.rfind(pattern, 0, end)
        if place > 0:
            return place + len(pattern)
    broken = re.search(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z", data[max(end - 4, 1) : end])
    return max(end - 4, 1) + broken.start() if broken else end

"""Documents out of files, one at a time, in memory bounded by `LONGEST` whatever a file holds.

A line that is not what it should be is handed to `bad` (which counts it, or ends the run) and reading goes on after it.
To read another format, write a reader and enter it in `READERS`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LONGEST = 64 << 20  # bytes of one JSON line, and of one document of a plain text file
_BLOCK = 16 << 20

Bad = Callable[[int, str], None]  # line number, reason


@dataclass(frozen=True)
class Document:
    """One text, with the source that its file names for it."""

    text: str
    source: str | None = None


@dataclass(frozen=True)
class OpenInput:
    """A file being read: `stream` gives its bytes, decompressed; `raw` is the file, whose position is the progress."""

    raw: IO[bytes]
    stream: IO[bytes]


def kind_of(path: Path) -> str | None:
    """The suffix that decides how a file is read, None when it is not known."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def open_input(path: Path) -> OpenInput:
    """Open a file of any known kind."""
    raw = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    return OpenInput(raw, gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw)


def read_documents(path: Path, opened: OpenInput, bad: Bad) -> Iterator[Document]:
    """The documents of an opened file, in order; a broken compressed file ends early and is told to `bad`."""
    kind = kind_of(path)
    assert kind is not None
    line = _Line()
    try:
        yield from READERS[kind](opened.stream, bad, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        bad(line.number + 1, f"the compressed file is damaged from here on: {error}")


class _Line:
    """Where a reader is, for messages about what it cannot foresee."""

    number = 0


def read_jsonl(stream: IO[bytes], bad: Bad, line: _Line) -> Iterator[Document]:
    """One JSON object a line: `text`, and optionally `source`. Other keys are ignored, blank lines too."""
    while data := stream.readline(LONGEST + 1):
        line.number += 1
        if len(data) > LONGEST and not data.endswith(b"\n"):
            bad(line.number, f"longer than {LONGEST >> 20} MiB")
            while (data := stream.readline(_BLOCK)) and not data.endswith(b"\n"):
                pass
            continue
        if not data.strip():
            continue
        try:
            yield _document(data)
        except (ValueError, RecursionError) as error:
            bad(line.number, _reason(error))


def read_text(stream: IO[bytes], bad: Bad, line: _Line) -> Iterator[Document]:
    """A file is one document; one longer than `LONGEST` is cut into several, at a blank line or the end of a line."""
    rest = b""
    while True:
        block = stream.read(_BLOCK)
        rest += block
        if block and len(rest) < LONGEST:
            continue
        if not rest:
            return
        end = len(rest) if not block else max(_end_of_unit(rest[:LONGEST]), 1)
        try:
            yield Document(_checked(rest[:end].decode("utf-8-sig")))
        except ValueError as error:
            bad(line.number + 1, _reason(error))
        line.number += rest[:end].count(b"\n")
        rest = rest[end:]
        if not block:
            return


READERS: dict[str, Callable[[IO[bytes], Bad, _Line], Iterator[Document]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".txt": read_text,
    ".txt.gz": read_text,
    ".md": read_text,
    ".rst": read_text,
}


def _document(data: bytes) -> Document:
    record = json.loads(data.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with a text")
    text, source = record.get("text"), record.get("source")
    if not isinstance(text, str):
        raise ValueError(f"no string under `text` (keys: {', '.join(map(str, list(record)[:8]))})")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"`source` is a {type(source).__name__}, expected a string")
    return Document(_checked(text), source and _checked(source))


def _checked(text: str) -> str:
    """The text itself; JSON can spell half of a surrogate pair, which no tokenizer takes."""
    text.encode("utf-8")
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return str(error)


def _end_of_unit(data: bytes) -> int:
    """Where to end a document in `data`: after the last blank line, else line, else space, else whole character."""
    for pattern in (b"\n\n", b"\n", b" "):
        place = data.rfind(pattern)
        if place > 0:
            return place + len(pattern)
    broken = re.search(rb"[\xc0-\xff][\x80-\xbf]*\Z", data)
    return broken.start() if broken else len(data)

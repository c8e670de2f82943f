"""JSON lines: one object a line, of which the text and the source are taken. Blank lines are nothing.

Lines are decoded by msgspec into just these two keys: everything else is skipped without being made (twenty million
`[]` in a line cost nothing), at about 2 GB/s. It is strict, so a line that it refuses is looked at again by `json`,
which takes what Python itself writes (NaN, endless integers) and explains the rest; `_SECOND_LOOK` bounds that.
Files that are not compressed are cut at the first line end after each multiple of the target, found by looking there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import msgspec

from megatron_spice.corpus.documents import BadHere, Document, Progress, ReadOptions, Span, stamp_of
from megatron_spice.corpus.formats import is_compressed
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.readers.streams import damage, open_stream, whole_file, why_damaged

_BLOCK = 1 << 16
_SKIP = 4 << 20
_SECOND_LOOK = 1 << 20  # bytes; beyond, `json` could take gigabytes to find out why a line is refused
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split(file: InputFile, target_bytes: int, options: ReadOptions) -> list[Span]:
    if is_compressed(file.path):
        return whole_file(file)
    stamp = stamp_of(file)
    size, start, spans = stamp[0], 0, []
    with open(file.path, "rb", buffering=0) as stream:
        while start < size:
            stop = size if size - start < 2 * target_bytes else _line_end(stream, start + target_bytes, size)
            spans.append(Span(file, start, stop, stop - start, stamp, first=None if start else 1))
            start = stop
    return spans


def _line_end(stream, place: int, size: int) -> int:
    """The first place after a line's end, at or after `place`."""
    stream.seek(place - 1)
    place -= 1
    while block := stream.read(_BLOCK):
        found = block.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(block)
    return size


def read(span: Span, options: ReadOptions, bad: BadHere, progress: Progress) -> Iterator[Document]:
    decode = _decoder(options, span.file.override)
    label = span.file.label
    position, stop = span.start, span.stop if not is_compressed(span.file.path) else float("inf")
    number = 0
    with open_stream(span, progress) as stream:
        try:
            while position < stop and (data := stream.readline(options.longest + 1)):
                number += 1
                position += len(data)
                if len(data) > options.longest and not data.endswith(b"\n"):
                    while (rest := stream.readline(_SKIP)) and not rest.endswith(b"\n"):
                        position += len(rest)
                    position += len(rest)
                    bad(number, f"longer than {options.longest >> 20} MiB")
                    continue
                try:
                    text, source = decode(data)
                except (ValueError, RecursionError) as error:
                    if data.strip(b" \t\r\n"):
                        bad(number, _reason(error))
                    continue
                yield Document(text, label(source), span, number)
        except damage() as error:
            bad(number + 1, why_damaged(error))


def _decoder(options: ReadOptions, override: bool) -> Callable[[bytes], tuple[str, str | None]]:
    """From a line to its text and source. With `override` the source is not asked for, so it may be anything."""
    fields = [("text", str)] if override else [("text", str), ("source", str | None, None)]
    record = msgspec.defstruct("Record", fields, rename={"text": options.text_key, "source": options.source_key})
    decode = msgspec.json.Decoder(record).decode

    def of_line(data: bytes) -> tuple[str, str | None]:
        try:
            found = decode(data)
        except (ValueError, RecursionError):
            data = data.removeprefix(_BYTE_ORDER_MARK)
            if len(data) <= _SECOND_LOOK:
                return _second_look(data, options, override)
            found = decode(data)
        return found.text, None if override else found.source

    return of_line


def _second_look(data: bytes, options: ReadOptions, override: bool) -> tuple[str, str | None]:
    record = json.loads(data.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with a text")
    text, source = record.get(options.text_key), record.get(options.source_key)
    if not isinstance(text, str):
        raise ValueError(f"no string under `{options.text_key}` (keys: {', '.join(list(record)[:8])[:200]})")
    if override:
        source = None
    if source is not None and not isinstance(source, str):
        raise ValueError(f"`{options.source_key}` is a {type(source).__name__}, expected a string")
    for value in (text, source or ""):
        value.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer takes
    return text, source


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        return f"not UTF-8 (byte {error.start})" + ("; it looks like UTF-16: convert it with iconv" if utf16 else "")
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, msgspec.DecodeError):
        return f"not JSON, or not as expected: {error}"
    return str(error)

"""Items of benchmark files, as the text that a training document must not hold: the question and its answer.

An item is a JSON object, a row of a table or a line of plain text. Of the former, the fields under the names below are
taken, in that order, whatever they hold (strings, numbers, lists or objects of them). A benchmark that cannot be read
whole is an error: what is skipped here would be trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spice.corpus.formats import ARROW, JSON_LINES, PARQUET, TEXT, format_of
from megatron_spice.corpus.inputs import find_inputs
from megatron_spice.corpus.readers.streams import damage, decompressed

QUESTION_FIELDS = ("question", "problem", "prompt", "query", "instruction", "input", "ctx", "goal", "text")
ANSWER_FIELDS = ("choices", "options", "answer", "answers", "solution", "target", "output", "response", "completion")
FIELDS = QUESTION_FIELDS + ANSWER_FIELDS


def benchmark_identities(arguments: Sequence[str]) -> list[dict]:
    """What tells these benchmarks from others, or from themselves after a change."""
    return [
        {"path": str(path.resolve()), "bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
        for path in benchmark_files(arguments)
    ]


def benchmark_files(arguments: Sequence[str]) -> list[Path]:
    """The files that the arguments stand for, as inputs are found."""
    try:
        return [file.path for file in find_inputs(arguments)]
    except ValueError as error:
        raise ValueError(f"--decontaminate: {error}") from None


def read_items(path: Path) -> Iterator[tuple[int, str]]:
    """(line or row from 1, text) of each item.

    Raises:
        ValueError: the file is broken or has none of the fields.
    """
    try:
        if format_of(path) in (PARQUET, ARROW):
            yield from _rows(path)
        else:
            yield from _lines(path)
    except (*damage(), UnicodeDecodeError) as error:
        raise ValueError(f"--decontaminate: {path} is damaged: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as raw:
        stream = decompressed(raw, path)
        if format_of(path) == TEXT:
            yield from ((number, line.decode("utf-8-sig")) for number, line in enumerate(stream, 1) if line.strip())
            return
        assert format_of(path) == JSON_LINES
        first = stream.readline()
        if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):  # many benchmarks are one JSON array
            for number, record in enumerate(_parsed(first + stream.read(), path, 1), 1):
                yield number, _text(record, f"{path}:{number}")
            return
        number, line = 1, first
        while line:
            if line.strip():
                yield number, _text(_parsed(line, path, number), f"{path}:{number}")
            number, line = number + 1, stream.readline()


def _parsed(data: bytes, path: Path, number: int):
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--decontaminate: {path}:{number}: not JSON: {error}") from None


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.dataset

    try:
        kind = "parquet" if format_of(path) == PARQUET else _arrow_kind(path)
        batches = pa.dataset.dataset(path, format=kind).to_batches() if kind != "stream" else _stream(path)
        number = 0
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield number, _text(record, f"{path}:{number}")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"--decontaminate: {path} cannot be read: {error}") from None


def _arrow_kind(path: Path) -> str:
    with open(path, "rb") as stream:
        return "ipc" if stream.read(6) == b"ARROW1" else "stream"


def _stream(path: Path):
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        yield from pa.ipc.open_stream(source)


def _text(record: object, place: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"--decontaminate: {place}: expected an object with fields, found {type(record).__name__}")
    found = [text for field in FIELDS if field in record for text in _strings(record[field])]
    if not found and not any(field in record for field in QUESTION_FIELDS):
        raise ValueError(
            f"--decontaminate: {place} has none of the fields {', '.join(QUESTION_FIELDS)}; "
            f"it has {', '.join(map(str, list(record)[:12]))}: rename one"
        )
    return "\n".join(found)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
    elif value is not None and not isinstance(value, bytes):
        yield str(value)

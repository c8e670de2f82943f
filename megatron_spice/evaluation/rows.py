"""Rows of local files: JSON lines, JSON, CSV, Parquet, Arrow, and folders of them as Hugging Face's `datasets` writes or downloads.

Of a folder with several splits the one asked for is read, `test` unless told otherwise; files that name no split count for
every one. Of a folder with several tables (GSM8K's repository has `main` and `socratic`, the same questions twice) the one that
the benchmark is made of is read, where it is told by which name, and otherwise none: what is read together decides the score, so
it is not guessed. Benchmarks are small: a file is read whole.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spice.corpus.formats import COMPRESSIONS
from megatron_spice.corpus.hf_folders import METADATA, saved_dataset
from megatron_spice.corpus.readers.streams import decompressed

Row = dict[str, Any]
SPLITS = ("train", "validation", "valid", "dev", "val", "test")
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_SHARD = re.compile(r"[-_.]?\d{5,}(?:-of-\d{5,})?(?:-[0-9a-f]{16})?(?=\.)")
"""The number of a file among several of one table, and the hash that older files have behind it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which files of a folder are a benchmark's: those with `names` in their paths, any if that is "" or nothing has it. `parts`:
    they are parts of one benchmark, however many tables they are."""

    names: str = ""
    parts: bool = False


def read_rows(path: Path, split: str = "test", wanted: Wanted = Wanted()) -> list[Row]:
    """All rows of a file, or of the files of a folder that are wanted.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: nothing that can be read, no such split, several tables, a row that is none; with the file and the line.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    rows = [row for file in (_files(path, split, wanted) if path.is_dir() else [path]) for row in _read(file)]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _files(folder: Path, split: str, wanted: Wanted) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        there = sorted(child.name for child in folder.iterdir() if child.is_dir())
        if split not in there and len(there) != 1:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(there)}: give one with --split")
        return saved_dataset(folder / (split if split in there else there[0])) or []
    if (saved := saved_dataset(folder)) is not None:
        return saved
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in METADATA and _reader(f) is not None)
    if not files:
        raise ValueError(f"{folder} holds no file that can be read; expected {', '.join(READERS)}")
    named_so = [file for file in files if re.search(wanted.names, file.relative_to(folder).as_posix(), re.IGNORECASE)]
    files = named_so or files
    named = {file: match.group(1) for file in files if (match := _SPLIT.search(str(file.relative_to(folder)).lower()))}
    splits = sorted(set(named.values()))
    if split not in splits and len(splits) > 1:
        raise ValueError(f"{folder} has files of the splits {', '.join(splits)}, none of {split!r}: give one with --split")
    chosen = split if split in splits else (splits or [""])[0]
    files = [file for file in files if named.get(file, chosen) == chosen]
    tables = {_table(file.relative_to(folder)): file for file in reversed(files)}
    if len(tables) > 1 and not (wanted.parts and named_so):
        shown = ", ".join(str(file.relative_to(folder)) for file in sorted(tables.values())[:8]) + (", ..." if len(tables) > 8 else "")
        raise ValueError(f"{folder} has {len(tables)} tables ({shown}): give the file or the folder of one of them, not the folder of all")
    return files


def _table(file: Path) -> str:
    """What the files of one table have in common: their path without split and number."""
    return _SPLIT.sub("", _SHARD.sub("", file.as_posix().lower()))


def _reader(file: Path) -> Callable[[Path], list[Row]] | None:
    name = file.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)


def _read(file: Path) -> list[Row]:
    read = _reader(file)
    if read is None:
        raise ValueError(f"{file} is of no kind that can be read; expected {', '.join(READERS)}")
    try:
        return read(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def _text(file: Path) -> str:
    with open(file, "rb") as raw:
        # The decompressors go by names in lower case too.
        return decompressed(raw, file).read().decode("utf-8-sig")


def _json(file: Path) -> list[Row]:
    """JSON lines, or one list, or one object that holds a list (`{"examples": [...]}`)."""
    text = _text(file)
    try:
        found = json.loads(text)
    except ValueError:
        return [_row(line, f"{file}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        found = lists[0] if len(lists) == 1 else [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{file} holds neither JSON lines nor a list of objects")
    return found


def _row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a JSON {type(found).__name__}, expected an object")
    return found


def _csv(file: Path) -> list[Row]:
    csv.field_size_limit(1 << 27)
    return list(csv.DictReader(io.StringIO(_text(file), newline="")))


def _parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from None


def _arrow(file: Path) -> list[Row]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            return opened.read_all().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Arrow: {error}") from None


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip

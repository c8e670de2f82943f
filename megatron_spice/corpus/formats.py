"""What a file is, told from its name: a format, and a compression around it."""

from __future__ import annotations

import os

JSON_LINES, TEXT, PARQUET, ARROW = "JSON lines", "text", "Parquet", "Arrow"

FORMATS = {
    ".jsonl": JSON_LINES,
    ".json": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".txt": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
COMPRESSIONS = (".gz", ".zst")
KINDS = f"{', '.join(FORMATS)}; all but the last two also with {' or '.join(COMPRESSIONS)}"


def split_name(path: str | os.PathLike[str]) -> tuple[str, str, str]:
    """(stem, suffix of the format, suffix of the compression); the suffixes are empty where the name has none known."""
    name = os.path.basename(path)
    compression = next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")
    stem, suffix = os.path.splitext(name[: len(name) - len(compression)])
    suffix = suffix.lower()
    if suffix not in FORMATS or (compression and FORMATS[suffix] in (PARQUET, ARROW)):
        return name, "", ""
    return stem, suffix, compression


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The format of a file, None when its name tells none."""
    return FORMATS.get(split_name(path)[1])


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether the file's bytes must be decompressed (Parquet and Arrow compress inside, which does not count)."""
    return bool(split_name(path)[2])

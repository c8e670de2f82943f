"""Which files a corpus is made from: files, folders and glob patterns become one sorted list without doubles."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.corpus.readers import READERS, kind_of


@dataclass(frozen=True)
class InputFile:
    """A file to read. `source` labels its documents; with `override` it does so even when they name a source."""

    path: Path
    source: str
    override: bool = False

    def identity(self) -> dict:
        """What tells this file from another, or from itself after a change, without reading it."""
        status = self.path.stat()
        return {
            "path": str(self.path.resolve()),
            "bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "source": self.source,
            "override": self.override,
        }


def find_inputs(arguments: Sequence[str], sources: Sequence[str] = ()) -> list[InputFile]:
    """The files that the arguments stand for, sorted within each argument, each file once.

    Args:
        arguments: files, folders (all files of known kinds below them; links to folders are not followed) or patterns
            (`**` goes through folders).
        sources: labels that override the documents' own: none, one for all, or one an argument.

    Raises:
        ValueError: an argument stands for nothing, a file is of no known kind, or the labels do not match.
    """
    if len(sources) not in (0, 1, len(arguments)):
        raise ValueError(f"{len(sources)} --source labels for {len(arguments)} inputs; give none, one, or one an input")
    labels = list(sources) * len(arguments) if len(sources) == 1 else list(sources)
    found: dict[str, InputFile] = {}
    for place, argument in enumerate(arguments):
        for path in _expand(argument):
            label = labels[place] if labels else _stem(path)
            found.setdefault(os.path.realpath(path), InputFile(path, label, override=bool(labels)))
    return list(found.values())


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        files = sorted(Path(top) / name for top, _, names in os.walk(path) for name in names)
        known = [file for file in files if kind_of(file) and file.is_file()]
        if not known:
            raise ValueError(f"folder {argument} holds none of {_kinds()} (of {len(files)} files)")
        return known
    if path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(argument, recursive=True) if Path(name).is_file())
    if not files:
        raise ValueError(f"input {argument}: no such file, folder or match")
    for file in files:
        if not kind_of(file):
            raise ValueError(f"input {file} is none of {_kinds()}; rename or convert it")
    return files


def _stem(path: Path) -> str:
    kind = kind_of(path)
    return path.name[: -len(kind)] or path.name


def _kinds() -> str:
    return ", ".join(sorted(READERS))

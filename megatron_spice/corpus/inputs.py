"""Which files a corpus is made from: files, folders and glob patterns become one sorted list without doubles.

Whatever would fail hours later is refused here: files that may not be read, links that lead nowhere, pipes and devices
named by hand. In folders, only regular files of known kinds count; what is hidden (`.git`, `.cache`) does not.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.corpus.formats import KINDS, format_of, split_name
from megatron_spice.corpus.hf_folders import METADATA, is_card, saved_dataset

_SHARD_OF = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")  # how Hugging Face numbers the files of one split


@dataclass(frozen=True)
class InputFile:
    """A file to read. `source` labels its documents; with `override` it does so even when they name a source."""

    path: Path
    source: str
    override: bool = False

    def label(self, own: str | None) -> str:
        """The label of a document that names `own` as its source."""
        return own if own and not self.override else self.source

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
        arguments: files, folders (all files of known kinds below them; links to folders are not followed), folders
            that Hugging Face `datasets` saved (the files that they list, of all splits), or patterns (`**` goes
            through folders).
        sources: labels that override the documents' own: none, one for all, or one an argument.

    Raises:
        ValueError: an argument stands for nothing, a file cannot be read or is of no known kind, or the labels do not
            match.
    """
    if len(sources) not in (0, 1, len(arguments)):
        raise ValueError(f"{len(sources)} --source labels for {len(arguments)} inputs; give none, one, or one an input")
    labels = list(sources) * len(arguments) if len(sources) == 1 else list(sources)
    found: dict[str, InputFile] = {}
    for place, argument in enumerate(arguments):
        for path, stem in _expand(argument):
            label = labels[place] if labels else stem
            found.setdefault(os.path.realpath(path), InputFile(path, label, override=bool(labels)))
    _check_readable([file.path for file in found.values()])
    return list(found.values())


def _expand(argument: str) -> list[tuple[Path, str]]:
    """(file, label) of each file."""
    path = Path(argument)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        files = [path]
    elif os.path.lexists(path):
        what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a pipe or a device"
        raise ValueError(f"input {argument} is {what}; give regular files")
    else:
        files = _matches(path)
    if not files:
        raise ValueError(f"input {argument}: no such file, folder or match")
    for file in files:
        if not format_of(file):
            raise ValueError(f"input {file} is none of {KINDS}; rename or convert it")
    return [(file, _stem(file)) for file in files]


def _matches(pattern: Path) -> list[Path]:
    """The files of a pattern. `**` does not go through links (`glob` does, and round for ever where they loop)."""
    place = next((place for place, part in enumerate(pattern.parts) if glob.has_magic(part)), None)
    if place is None:
        return []
    base, rest = Path(*pattern.parts[:place]), list(pattern.parts[place:])
    found = base.glob("/".join(rest + ["*"] * (rest[-1] == "**")))
    return sorted(file for file in found if file.is_file() and not _hidden(file.relative_to(base), rest))


def _hidden(file: Path, pattern: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in file.parts) and not any(part.startswith(".") for part in pattern)


def _in_folder(folder: Path) -> list[tuple[Path, str]]:
    listed = saved_dataset(folder)
    if listed is not None:
        return [(file, folder.resolve().name) for file in listed]
    files = sorted(_walk(folder))
    known = [file for file in files if format_of(file) and file.name not in METADATA and _is_regular(file)]
    data = [file for file in known if not is_card(file)]
    if not data:
        raise ValueError(f"folder {folder} holds none of {KINDS} (of {len(files)} files)")
    return [(file, _stem(file)) for file in data]


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}")

    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(top) / name for name in names if not name.startswith("."))


def _is_regular(file: Path) -> bool:
    if file.is_symlink() and not file.exists():
        raise ValueError(f"input {file} is a link that leads nowhere; delete it or fetch what it should lead to")
    return file.is_file()


def _check_readable(files: Sequence[Path]) -> None:
    closed = [str(file) for file in files if not os.access(file, os.R_OK)]
    if closed:
        more = f" and {len(closed) - 5} more" if len(closed) > 5 else ""
        raise ValueError(f"no permission to read {', '.join(closed[:5])}{more}")


def _stem(path: Path) -> str:
    """The file's name without what tells its kind and, for one of many files of a data set, its number."""
    stem = split_name(path)[0]
    return _SHARD_OF.sub("", stem) or path.name

"""Hugging Face data set folders, without `datasets`: which of the files hold the rows.

Two kinds are in use. `save_to_disk` writes, for each split, Arrow streams and a `state.json` that lists them (a folder
may hold stale ones beside), and for several splits a `dataset_dict.json` above. A snapshot of a repository is a plain
folder of Parquet or JSON lines; there only the card and the metadata have to be told from the data.
"""

from __future__ import annotations

import json
from pathlib import Path

METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


def saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a folder made by `save_to_disk`, splits in their order; None when it is not one.

    Raises:
        ValueError: a listing is broken or names a file that is not there.
    """
    if (folder / "dataset_dict.json").is_file():
        return [file for split in _listed(folder / "dataset_dict.json", "splits") for file in _split(folder / split)]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _split(folder)
    return None


def is_card(file: Path) -> bool:
    """Whether this is a repository's README.md with the metadata block that Hugging Face puts first."""
    if file.name != "README.md":
        return False
    with open(file, "rb") as stream:
        return stream.read(4) in (b"---\n", b"---\r")


def _split(folder: Path) -> list[Path]:
    files = [folder / name for name in _listed(folder / "state.json", "_data_files", "filename")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder / 'state.json'} lists {missing[0].name}, which is not there; copy the folder again")
    return files


def _listed(path: Path, key: str, name: str | None = None) -> list[str]:
    """The strings under `key` (of each entry's `name`) in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        listed = [entry[name] if name else entry for entry in found]
        if not all(isinstance(entry, str) and Path(entry).name == entry for entry in listed):
            raise ValueError(f"`{key}` is not a list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); copy the data set's folder again") from None
    return listed

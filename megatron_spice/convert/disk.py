"""Bringing files and their names to the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from megatron_spice.checkpoint.store import sync_folder


def sync_file(file: IO[Any]) -> None:
    """Brings a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # files are opened and synced in the same way

"""Bringing files and their names to the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import torch

from megatron_spice.checkpoint.store import sync_folder


def sync_file(file: IO[Any]) -> None:
    """Brings a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # files are opened and synced in the same way


def save(value: Any, file: IO[bytes]) -> None:
    """`torch.save`, of whose failures the disk's are told as such: it would only say that it is at an unexpected place.

    Raises:
        OSError: no space, and the like.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise

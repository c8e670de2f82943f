"""Any checkpoint as a Hugging Face folder, for whoever serves it."""

from __future__ import annotations

from pathlib import Path

from megatron_spice.convert.find import open_source
from megatron_spice.convert.hf_source import HFSource
from megatron_spice.convert.hf_target import HFTarget
from megatron_spice.convert.job import convert


def hugging_face_form(checkpoint: Path, folder: Path) -> Path:
    """`checkpoint` itself if it is a Hugging Face folder, else `folder`, which is written if it is not there.

    Raises:
        ValueError, FileNotFoundError, ConfigError: it is no checkpoint, or cannot be written.
    """
    source = open_source(checkpoint)
    if isinstance(source, HFSource):
        return checkpoint
    if not folder.exists():
        convert(source, HFTarget(source), folder, {"command": "hf_form"}, 1, folder.name)
    return folder

"""Any checkpoint as a Hugging Face folder, for whoever serves it.

The folder says in `made_from.json` of which checkpoint it is, so that it is made once, and again when the checkpoint is another.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_spice.convert.find import open_source
from megatron_spice.convert.hf_source import HFSource
from megatron_spice.convert.hf_target import HFTarget
from megatron_spice.convert.job import convert
from megatron_spice.convert.stamp import stamp

MADE_FROM = "made_from.json"


def hugging_face_form(checkpoint: Path, folder: Path) -> Path:
    """`checkpoint` itself if it is a Hugging Face folder, else `folder`, which is written if it is not there or was not made of
    `checkpoint` as it is.

    Raises:
        ValueError, FileNotFoundError, ConfigError: it is no checkpoint, or cannot be written.
    """
    source = open_source(checkpoint)
    if isinstance(source, HFSource):
        return checkpoint
    origin = {"checkpoint": str(checkpoint.resolve()), "stamp": stamp(checkpoint)}
    if _made_from(folder) != origin:
        if folder.exists():
            shutil.rmtree(folder)
        convert(source, HFTarget(source), folder, {"command": "hf_form"}, 1, folder.name)
        (folder / MADE_FROM).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    return folder


def _made_from(folder: Path) -> object:
    try:
        return json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

"""The small files of a Hugging Face model folder that travel with its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# Everything an engine or transformers needs besides the weights.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_small_files(source: Path, target: Path) -> None:
    """Copies config, tokenizer and generation files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def set_dtype(folder: Path, dtype: str) -> None:
    """Makes config.json say which precision the weights beside it have; a file that says so already stays as it is."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) != dtype:
        path.write_text(json.dumps({**config, key: dtype}, indent=2) + "\n")

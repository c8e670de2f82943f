"""The small files of a Hugging Face model folder that travel with its weights."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

# Everything an engine or transformers needs besides the weights, and the licence that goes with them: configuration,
# tokenizer in any of its forms, chat templates. An index of weights is a JSON file too, but goes with its weights.
PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
INDICES = "*.index.json"


def small_files(folder: Path) -> list[Path]:
    """The small files, as paths inside the folder. A link counts as what it leads to (the Hub's cache is full of them)."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if not path.match(INDICES)}
    return sorted(path.relative_to(folder) for path in found if not path.is_dir())


def copy_small_files(source: Path, target: Path) -> None:
    """Copies config, tokenizer and generation files.

    Raises:
        ValueError: one of them is a link that leads nowhere.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in small_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source / name, target / name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            raise ValueError(f"{source / name} is a link that leads nowhere; copy the folder again from its source") from error


def set_dtype(folder: Path, dtype: str, quantization: dict[str, Any] | None = None) -> None:
    """Makes config.json say which precision the weights beside it have, and how they are quantised if they are; a file that
    says so already stays as it is."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    wanted = {name: value for name, value in config.items() if name != "quantization_config"} | {key: dtype}
    if quantization:
        wanted["quantization_config"] = quantization
    if config != wanted:
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

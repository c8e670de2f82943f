"""Megatron-LM's own preprocessing scripts as commands to time, and what they need to start on a machine without GPU.

Nothing of the checkout is edited. Its head wants Python 3.12 (`typing.override`) and Triton: where these are missing, a
`sitecustomize` takes the first from typing_extensions, and the stand-in of the CPU platform is put on the path for the second.

preprocess_data_fast.py hands the tokenizer to gigatoken as it is, which refuses some: it is then given a copy of the folder in
which the vocabulary has an entry for every byte.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from megatron_spice.cluster.platform import STUBS
from megatron_spice.corpus.plain_text import byte_level_alphabet

SCRIPTS = ("preprocess_data.py", "preprocess_data_fast.py")
_OVERRIDE = "import typing, typing_extensions\ntyping.override = typing_extensions.override\n"


def command(script: str, checkout: Path, texts: Path, output: Path, tokenizer: Path, workers: int) -> list[str]:
    """The script's command line for one input file; it writes `output`_text_document.bin and .idx."""
    own = ["--use-gigatoken"] if script == "preprocess_data_fast.py" else ["--workers", str(workers)]
    return [
        sys.executable, str(checkout / "tools" / script), "--input", str(texts), "--output-prefix", str(output),
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), *own,
    ]  # fmt: skip


def environment(checkout: Path, folder: Path, base: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment that the scripts run in, and in words what had to be added to `base`; `folder` is for its files."""
    paths, added = [str(checkout)], []
    if importlib.util.find_spec("triton") is None:
        paths.insert(0, str(STUBS))
        added.append("a stand-in for Triton")
    if sys.version_info < (3, 12):
        (folder / "sitecustomize.py").write_text(_OVERRIDE)
        paths.insert(0, str(folder))
        added.append("typing.override from typing_extensions")
    return {**base, "PYTHONPATH": os.pathsep.join(paths)}, added


def tokenizer_for_gigatoken(tokenizer: Path, folder: Path) -> tuple[Path, str | None]:
    """A tokenizer folder that gigatoken takes as it is, and in words what was changed in it."""
    spec = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    missing = [character for character in byte_level_alphabet() if character not in vocab]
    if not missing or "ByteLevel" not in json.dumps(spec["pre_tokenizer"]):
        return tokenizer, None
    size = 1 + max([*vocab.values(), *(token["id"] for token in spec["added_tokens"])])
    vocab.update({character: size + place for place, character in enumerate(missing)})
    spec["model"]["byte_fallback"] = False
    copy = folder / f"{tokenizer.name}-all-bytes"
    shutil.copytree(tokenizer, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.gguf"))
    (copy / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return copy, f"{len(missing)} bytes that the vocabulary lacks added, else gigatoken refuses it"

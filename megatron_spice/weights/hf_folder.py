"""Reading a Hugging Face model folder: safetensors by name."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import Entry, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
"""Types by the names that safetensors has for them."""
HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers that old versions of transformers stored and that follow from `config.json`."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HFTensors:
    """The tensors of a folder, read one at a time from memory-mapped safetensors."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            FileNotFoundError: the folder holds no safetensors weights.
            ValueError: an index, or a file, that cannot be read.
        """
        self.folder = Path(folder)
        self._open: dict[str, safe_open] = {}
        if (self.folder / INDEX).exists():
            self.files = _weight_map(self.folder / INDEX)
        elif (self.folder / SINGLE).exists():
            self.files = dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
        else:
            raise FileNotFoundError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; a model in another format has to be saved with "
                "transformers' save_pretrained first"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._opened(self.files[name]).get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def _opened(self, file: str) -> safe_open:
        """A file: each is opened once, which checks that it is as long as its header says."""
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / file} cannot be read: {error}; copy it again from the model's source") from error
        return self._open[file]

    @property
    def paths(self) -> list[Path]:
        """The files with weights, and their index if they have one."""
        index = [self.folder / INDEX] if (self.folder / INDEX).exists() else []
        return [self.folder / file for file in sorted(set(self.files.values()))] + index

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first tensor."""
        return self.dtype_of(next(iter(self.files)))

    def dtype_of(self, name: str) -> torch.dtype:
        """The precision of a tensor, which is not read.

        Raises:
            ValueError: numbers of a kind that no model is trained in.
        """
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{self.folder}: {name} is stored as {stored}; supported: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def _slice(self, name: str) -> Any:
        try:
            return self._opened(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder}: {self.files[name]} holds no {name}, its index says so: {error}") from error

    def check(self, entries: Iterable[Entry], architecture: ModelArchitecture, beside: Collection[str] = ()) -> None:
        """Every name of the table is here with its shape, and nothing else is but the names `beside`.

        Raises:
            ValueError: names or shapes differ; the message lists them.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            expected.update(hf_shapes(entry, architecture))
        present = {name for name in self.files if not HARMLESS.fullmatch(name)} - set(beside)
        if architecture.tied_embeddings and HEAD in present:
            present.discard(HEAD)  # some folders store the tied head a second time
            self._check_tied_head()
        missing, extra = sorted(set(expected) - present), sorted(present - set(expected))
        if missing or extra:
            raise ValueError(
                f"{self.folder}: tensors do not match the {architecture.family} architecture of its config.json; "
                f"missing {missing[:5]} ({len(missing)} in all), unexpected {extra[:5]} ({len(extra)} in all)"
            )
        for name, shape in expected.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, its config.json says {shape}")

    def _check_tied_head(self) -> None:
        if EMBEDDING not in self.files:
            return
        head, embedding = self[HEAD], self[EMBEDDING]
        if head.dtype != embedding.dtype or head.shape != embedding.shape or not _same_bytes(head, embedding):
            raise ValueError(
                f"{self.folder}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings=true; set it to false "
                "if the head is its own matrix"
            )


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: NaN equals itself, and 0 not -0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _weight_map(index: Path) -> dict[str, str]:
    """Which file has which tensor. Files lie beside their index."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in files.values() if Path(file).name != file]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}; copy it again from the model's source") from error
    if outside:
        raise ValueError(f"{index} names a file outside of its folder: {outside[0]}")
    return files

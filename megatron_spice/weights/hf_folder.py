"""Reading and writing a Hugging Face model folder: safetensors by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_spice.checkpoint.hf_files import copy_small_files
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import Entry, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFTensors:
    """The tensors of a folder, read one at a time from memory-mapped safetensors."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            FileNotFoundError: the folder holds no safetensors weights.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            self.files = json.loads((self.folder / INDEX).read_text())["weight_map"]
        elif (self.folder / SINGLE).exists():
            with safe_open(self.folder / SINGLE, framework="pt") as file:
                self.files = {name: SINGLE for name in file.keys()}
        else:
            raise FileNotFoundError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; a model in another format has to be saved with "
                "transformers' save_pretrained first"
            )
        self._open: dict[str, safe_open] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file(name).get_tensor(name)

    def _file(self, name: str) -> safe_open:
        """The open file with a tensor: each is opened once."""
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first tensor."""
        return self[next(iter(self.files))].dtype

    def check(self, entries: Iterable[Entry], architecture: ModelArchitecture) -> None:
        """Every name of the table is here with its shape, and nothing else is.

        Raises:
            ValueError: names or shapes differ; the message lists them.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            expected.update(hf_shapes(entry, architecture))
        present = set(self.files)
        if architecture.tied_embeddings:
            present.discard("lm_head.weight")  # some folders store the tied head a second time
        missing, extra = sorted(set(expected) - present), sorted(present - set(expected))
        if missing or extra:
            raise ValueError(
                f"{self.folder}: tensors do not match the {architecture.family} architecture of its config.json; "
                f"missing {missing[:5]} ({len(missing)} in all), unexpected {extra[:5]} ({len(extra)} in all)"
            )
        for name, shape in expected.items():
            found = tuple(self._file(name).get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, its config.json says {shape}")


def write_hf_folder(
    tensors: Iterator[tuple[str, torch.Tensor]], small_files: Path, target: Path, shard_bytes: int = 4 << 30
) -> None:
    """Writes tensors as safetensors shards of about `shard_bytes` with an index, next to the small files."""
    copy_small_files(small_files, target)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, int] = {}
    number, size, total = 1, 0, 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if shard and size + count > shard_bytes:
            save_file(shard, target / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
            shard, size = {}, 0
            number += 1
        shard[name] = tensor.contiguous()
        weight_map[name] = number
        size += count
        total += count
    save_file(shard, target / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
    _name_shards(target, weight_map, number, total)


def _name_shards(target: Path, weight_map: dict[str, int], count: int, total: int) -> None:
    """Gives the shards the names that every reader expects."""
    if count == 1:
        (target / "shard-00001.safetensors").rename(target / SINGLE)
        return
    final = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, name in final.items():
        (target / f"shard-{number:05d}.safetensors").rename(target / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[n] for name, n in weight_map.items()}}
    (target / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))

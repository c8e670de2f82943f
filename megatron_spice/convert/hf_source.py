"""A Hugging Face folder as a source; block-FP8 weights come out as bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_spice.config.engine_weights import SCALE_SUFFIX
from megatron_spice.config.hf import ModelArchitecture, read_config
from megatron_spice.convert.source import check_dtype
from megatron_spice.weights.fp8 import DTYPES, WEIGHT_BLOCK, dequantise
from megatron_spice.weights.hf_folder import HFTensors
from megatron_spice.weights.names import Entry, hf_shapes, table

E4M3 = DTYPES["e4m3"]


class HFSource:
    """The tensors of safetensors files, mapped.

    Raises:
        ConfigError: an architecture that is not supported.
        ValueError: names or shapes do not fit it.
        FileNotFoundError: no safetensors.
    """

    kind = "Hugging Face"

    def __init__(self, folder: Path) -> None:
        config, path = read_config(folder)
        quantization = config.pop("quantization_config", None)
        if quantization is not None:
            _check_quantization(quantization, path)
        self.folder = self.hf = folder
        self.architecture = ModelArchitecture.from_config(config, path)
        self.entries = table(self.architecture)
        self._tensors = HFTensors(folder)
        self._quantised = self._find_quantised() if quantization is not None else frozenset()
        self._tensors.check(self.entries, self.architecture, {name + SCALE_SUFFIX for name in self._quantised})
        self.paths = [*self._tensors.paths, folder / "config.json"]
        for entry in self.entries:
            for name in entry.hf:
                self._dtype(name)

    def _find_quantised(self) -> frozenset[str]:
        """The weights that are FP8 numbers with factors beside them."""
        names = {name for entry in self.entries for name in hf_shapes(entry, self.architecture) if name in self._tensors}
        quantised = frozenset(name for name in names if self._tensors.dtype_of(name) == E4M3)
        lost = sorted(name for name in quantised if name + SCALE_SUFFIX not in self._tensors)
        if lost:
            raise ValueError(f"{self.folder}: {lost[:3]} ({len(lost)} in all) are FP8 and have no {SCALE_SUFFIX} beside them")
        return quantised

    def dtype(self, entry: Entry) -> torch.dtype:
        dtypes = {self._dtype(name) for name in entry.hf}
        if len(dtypes) > 1:
            raise ValueError(f"{self.folder}: {entry.hf} are stored in different precisions, {sorted(map(str, dtypes))}")
        return dtypes.pop()

    def _dtype(self, name: str) -> torch.dtype:
        if name in self._quantised:
            return torch.bfloat16
        return check_dtype(self._tensors.dtype_of(name), name, self.folder)

    def read(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        return {name: self._read(name) for name in entry.hf}

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if name not in self._quantised:
            return tensor
        factors = self._tensors[name + SCALE_SUFFIX].float()
        try:
            return dequantise(tensor, factors, WEIGHT_BLOCK, torch.bfloat16)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {name}: {error}") from error

    def describe(self) -> list[str]:
        files = [path for path in self.paths if path.suffix == ".safetensors"]
        lines = [f"{len(files)} safetensors file{'s' * (len(files) > 1)}"]
        if self._quantised:
            lines.append(f"block-FP8: {len(self._quantised)} weights")
        return lines


def _check_quantization(quantization: Any, path: str) -> None:
    wanted = {"quant_method": "fp8", "weight_block_size": list(WEIGHT_BLOCK)}
    found = {key: quantization.get(key) for key in wanted} if isinstance(quantization, dict) else quantization
    if found != wanted:
        raise ValueError(f"{path}: quantization_config {found} is not supported; supported: {wanted}, or the bf16 model")

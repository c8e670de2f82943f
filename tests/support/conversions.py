"""What the command line does, in the tests' own process: to Megatron in either format, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_spice.convert.find import open_source
from megatron_spice.convert.hf_target import SHARD_BYTES, HFTarget
from megatron_spice.convert.job import convert
from megatron_spice.convert.mp_rank_layout import make_layout
from megatron_spice.convert.mp_rank_target import MpRankTarget
from megatron_spice.convert.source import Cast
from megatron_spice.convert.torch_dist_target import TorchDistTarget


def to_torch_dist(source: Path, folder: Path, hf: Path | None = None) -> Path:
    opened = open_source(source, hf)
    convert(opened, TorchDistTarget(opened), folder, {}, 1, "test")
    return folder


def to_mp_rank(source: Path, folder: Path, implementation: str = "local", tensor=1, pipeline=1, virtual=1, expert=1) -> Path:
    opened = open_source(source)
    layout = make_layout(opened.architecture, tensor, pipeline, virtual, expert)
    convert(opened, MpRankTarget(opened, layout, implementation), folder, {}, 1, "test")
    return folder


def to_hf(
    source: Path, folder: Path, hf: Path | None = None, fp8: bool = False, shard_bytes: int = SHARD_BYTES, dtype: Any = None
) -> Path:
    opened = open_source(source, hf)
    dtype = torch.bfloat16 if fp8 else dtype
    opened = Cast(opened, dtype) if dtype else opened
    convert(opened, HFTarget(opened, fp8, shard_bytes), folder, {}, 1, "test")
    return folder

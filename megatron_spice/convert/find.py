"""Which kind of checkpoint a folder is, and opening it.

    config.json and safetensors                        a Hugging Face folder
    weights/.metadata and hf/                          a checkpoint of ours: made by hf-to-megatron, or an iteration of a run
    .metadata                                          Megatron-LM's torch_dist format, one iteration
    mp_rank_*/model_optim_rng.pt                       Megatron-LM's torch format, one iteration
    latest_checkpointed_iteration.txt                  a folder of such iterations: the newest
"""

from __future__ import annotations

from pathlib import Path

from megatron_spice.checkpoint import store
from megatron_spice.convert.source import Source

TRACKER = "latest_checkpointed_iteration.txt"
_METADATA = ".metadata"


def open_source(folder: Path, hf: Path | None = None) -> Source:
    """Opens a folder of any kind.

    Args:
        hf: a Hugging Face folder with config.json and tokenizer, for checkpoints that have none.

    Raises:
        ValueError, FileNotFoundError, ConfigError: it is none, or not a whole one; the message says what is wrong.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}")
    if store.is_megatron(folder):
        from megatron_spice.convert.torch_dist import TorchDistSource

        return TorchDistSource(folder / store.WEIGHTS, hf or folder / store.HF)
    inside = newest_iteration(folder)
    if (inside / _METADATA).exists():
        from megatron_spice.convert.torch_dist import TorchDistSource

        return TorchDistSource(inside, _need(hf, folder))
    if any(inside.glob("mp_rank_*")):
        from megatron_spice.convert.mp_rank import MpRankSource

        return MpRankSource(inside, _need(hf, folder))
    if (folder / "config.json").is_file():
        from megatron_spice.convert.hf_source import HFSource

        return HFSource(folder)
    raise ValueError(
        f"{folder} is no checkpoint: it holds neither config.json, nor {store.WEIGHTS}/ and {store.HF}/, nor {_METADATA}, "
        f"nor mp_rank_*/, nor {TRACKER}"
    )


def newest_iteration(folder: Path) -> Path:
    """The newest iteration in one of Megatron-LM's folders of them; the folder itself if it is not one."""
    if not (folder / TRACKER).is_file():
        return folder
    text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise ValueError(f"{folder / TRACKER} says {text[:20]!r}, which is neither a number nor `release`")
    inside = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not inside.is_dir():
        raise ValueError(f"{folder / TRACKER} says {text}, but {inside} is not there")
    return inside


def _need(hf: Path | None, folder: Path) -> Path:
    if hf is None or not (hf / "config.json").is_file():
        given = "" if hf is None else f"; {hf} holds none"
        raise ValueError(f"{folder} holds no config.json: give the Hugging Face folder of its model with --hf{given}")
    return hf

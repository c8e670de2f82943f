"""The whole model in one process, without optimiser or ranks: what conversion and export need."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_spice.checkpoint import store
from megatron_spice.checkpoint.checkpointer import load_tensors, save_tensors
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy import parallel
from megatron_spice.policy.model import build_chunks
from megatron_spice.weights.gather import Gatherer
from megatron_spice.weights.load import load_hf
from megatron_spice.weights.stage import Key, Stage, stage_parameters

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class WholeModel:
    """Use as a context manager: it owns a process group of one.

    Args:
        dtype: of the weights where they come from, so that nothing is rounded on the way.

    Raises:
        ValueError: weights in a precision that is not trained in.
    """

    def __init__(self, architecture: ModelArchitecture, model: Path, dtype: torch.dtype) -> None:
        if dtype not in PRECISION:
            raise ValueError(f"{model} holds {dtype} weights; save it as bfloat16 or float32 with transformers first")
        self.architecture = architecture
        self.config = PolicyConfig(model=model, precision=PRECISION[dtype])

    def __enter__(self) -> WholeModel:
        # A file, not a port: nothing here talks to another process.
        self._rendezvous = tempfile.TemporaryDirectory()
        dist.init_process_group("gloo", init_method=f"file://{self._rendezvous.name}/store", rank=0, world_size=1)
        layout = ParallelLayout(chunk_layers=(self.architecture.num_layers,))
        placement = parallel.initialize(layout, seed=0, timeout=60)
        [self.model] = build_chunks(self.architecture, self.config, layout, placement, temperature=1.0)
        self.stage = Stage(0, layout, 0, self.architecture.num_experts)
        return self

    def __exit__(self, *exc: object) -> None:
        parallel.shutdown()
        dist.destroy_process_group()
        self._rendezvous.cleanup()

    @property
    def parameters(self) -> dict[Key, torch.nn.Parameter]:
        """The model's parameters, all in one chunk."""
        return stage_parameters([self.model])

    def load_hf(self, folder: Path) -> None:
        """Weights from a Hugging Face folder."""
        load_hf(self.parameters, folder, self.architecture, self.stage, 0, 1)

    def load(self, checkpoint: Path) -> None:
        """Weights from a checkpoint, of whatever layout."""
        load_tensors(self, checkpoint, with_optimizer=False)

    def save(self, folder: Path) -> None:
        """Weights into an existing empty folder."""
        save_tensors(self, folder, with_optimizer=False)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and tensors, one Megatron tensor at a time."""
        for bucket in Gatherer(self.architecture, self.stage, bucket_elements=1).buckets(self.parameters):
            yield from bucket.items()

    @staticmethod
    def dtype_of(checkpoint: Path) -> torch.dtype:
        """The precision of a checkpoint's weights, by its metadata."""
        tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint / store.WEIGHTS))
        return next(tensor.dtype for key, tensor in tensors.items() if key.endswith("word_embeddings.weight"))

    # -- what save_tensors and load_tensors ask for ---------------------------------------------------------------

    def model_state(self) -> dict[str, Any]:
        return {"chunk0": self.model.sharded_state_dict()}

    def optimizer_state(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        raise NotImplementedError("a model without an optimiser has no optimiser state")

    def load_state(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None:
        self.model.load_state_dict(model_state["chunk0"])

"""Which fused kernels this process trains with: Apex's where NVIDIA's Apex is installed, else Transformer Engine's, else
torch's own operations.

Adam: Megatron knows all three and takes Transformer Engine's before Apex's, without a setting for it; `choose_adam` is
the one place that says otherwise. Weight gradients: Megatron's own linear layers add theirs straight into the float32
gradient buffer with a kernel of Apex's; Transformer Engine's layers bring their own. The `apex` of PyPI is another
project, which has no `apex.optimizers` and so is not taken for NVIDIA's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

APEX_KERNELS = "amp_C"  # an Apex built without CUDA extensions can be imported, and its FusedAdam refuses to be made
APEX_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
NAMES = {"apex": "Apex", "transformer_engine": "Transformer Engine", "torch": "torch"}


def choose_adam() -> str:
    """Makes Apex's FusedAdam the one that Megatron builds, if there is one. Returns whose Adam it will build.

    Megatron decides at import and keeps the class under the name `Adam` in two modules. Their own code treats the two
    fused Adams alike.
    """
    if _found(APEX_KERNELS):
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            pass
        else:
            megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    return adam()


def adam() -> str:
    """Whose Adam Megatron builds in this process: "apex", "transformer_engine" or "torch"."""
    return megatron_optimizer.Adam.__module__.split(".")[0]


def gradient_accumulation_fusion(device: str, uses_te: bool) -> bool:
    """Megatron's setting of that name, for a model on `device` ("cpu", "cuda") whose layers are Transformer Engine's or
    Megatron's own. It means Apex's kernel, and Megatron's own layers refuse to be made without it; Transformer Engine's
    need only `fuse_engine_layers`."""
    return device == "cuda" and not uses_te and _found(APEX_GRADIENT_KERNEL)


def fuse_engine_layers(chunks: Iterable[torch.nn.Module]) -> int:
    """Lets Transformer Engine's layers add weight gradients straight into Megatron's gradient buffers. Returns how many.

    For after the data-parallel wrapper was made: the buffers are its.
    """
    layers = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)


def describe(device: str, uses_te: bool) -> str:
    """For the start-up log, of a model on `device` whose layers are Transformer Engine's or not: `Adam by torch, weight
    gradients not fused`."""
    gradients = "not fused"
    if uses_te:
        gradients = "fused by Transformer Engine"
    elif gradient_accumulation_fusion(device, uses_te):
        gradients = "fused by Apex"
    return f"Adam by {NAMES[adam()]}, weight gradients {gradients}"


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

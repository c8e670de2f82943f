"""Block-quantised FP8 layers of a CPU engine. Loaded only inside the SGLang server's scheduler process.

SGLang's FP8 layers need its AMX kernels on a CPU, which are not used here, and end the server without them. Everything before
the product is its own here too: the parameters (`weight` in E4M3, `weight_scale_inv` in float32, projections and experts
fused), which layers are left out, and how a sync loads them. Only the product is ours: at the end of each weight update the
numbers are multiplied with their blocks' factors into a bfloat16 copy, exactly, as the factors are powers of two
(`weights/fp8.py`), and that copy is multiplied.

So a CPU engine computes what one with bfloat16 weights rounded to FP8 computes, to the bit; it saves no memory and no time,
and does not round activations, which CUDA kernels do. It is there so that what is sent to FP8 engines is received and used
somewhere in every test run.

SGLang has a registry of quantisations, and this takes the place of `fp8` in it, in this process only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearBase
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod


def dequantise_blocks(values: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Each block of `values` [..., m, n] times its number in `scale_inv` [..., ceil(m / rows), ceil(n / columns)], bfloat16."""
    rows, columns = values.shape[-2:]
    factors = scale_inv.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (values.float() * factors).bfloat16()


class CpuFp8Linear(Fp8LinearMethod):
    """SGLang's FP8 linear with a product in bfloat16."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called at the end of the start and of each weight update."""
        block = tuple(self.quant_config.weight_block_size)
        layer.dequantised = dequantise_blocks(layer.weight.data, layer.weight_scale_inv.data, block)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., k] times the layer's weight [n, k], transposed."""
        return torch.nn.functional.linear(x, layer.dequantised, bias)


class CpuFp8Experts(Fp8MoEMethod):
    """SGLang's FP8 mixture of experts with products in bfloat16."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called at the end of the start and of each weight update."""
        block = tuple(self.quant_config.weight_block_size)
        layer.dequantised = SimpleNamespace(
            num_experts=layer.num_experts,
            w13_weight=dequantise_blocks(layer.w13_weight.data, layer.w13_weight_scale_inv.data, block),
            w2_weight=dequantise_blocks(layer.w2_weight.data, layer.w2_weight_scale_inv.data, block),
        )

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """Keeps the settings; there is no kernel to choose."""
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The tokens of `dispatch_output` through their experts."""
        hidden, routing = dispatch_output.hidden_states, dispatch_output.topk_output
        output = moe_forward_native(layer.dequantised, hidden, routing, self.moe_runner_config)
        return StandardCombineInput(hidden_states=output)


class CpuFp8Config(Fp8Config):
    """SGLang's FP8 configuration, giving out the two layers above where its own would be."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What multiplies in `layer`, or None where nothing is quantised."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, Fp8MoEMethod):
            return CpuFp8Experts(self)
        if isinstance(layer, LinearBase) and isinstance(method, Fp8LinearMethod):
            return CpuFp8Linear(self)
        return method


def register() -> None:
    """Makes this process's `fp8` the one that computes on any CPU."""
    WEIGHT_LOADER_V2_SUPPORTED.append(CpuFp8Linear.__name__)  # by name: a subclass is not known to load what its base does
    QUANTIZATION_METHODS["fp8"] = CpuFp8Config

"""FP8 linear layers for machines without FP8: Megatron's parallel linears, whose matrix products see what FP8 ones see.

Every operand is rounded to FP8 and back by `weights/fp8.py` before it is multiplied, with the blocks that Transformer
Engine's recipes use, each along the dimension that its product sums over:

    forward   y  = x W^T      x in 1 x 128 along k,         W in 128 x 128
    dgrad     dx = dy W       dy in 1 x 128 along n,        W in 128 x 128 (the same numbers)
    wgrad     dW = dy^T x     dy and x in 1 x 128 along t   (from the unrounded ones: nothing is rounded twice)

`tensorwise` takes the whole operand for a block, with a factor that is no power of two. Block-wise operands are exact in
bfloat16, so their products run as bfloat16 ones; tensor-wise ones need float32. Results have the input's type. What is
rounded is what a rank multiplies: where a shard is no multiple of 128 its blocks are other blocks than those of one rank.

Only the product on this rank is ours; whatever is communicated goes through Megatron's own mappings, so tensor, sequence
and expert parallelism are its own too. Slower than bfloat16: this shows what FP8 does to the numbers, not to the time.

Shapes: t tokens on this rank (gathered where sequences are split), k inputs, n outputs of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_spice.config.schema import Fp8Config
from megatron_spice.weights.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Block, Format, round_trip


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the operands of one layer's products are rounded."""

    tensorwise: bool
    gradients: Format

    @classmethod
    def of(cls, config: Fp8Config) -> Rounding:
        """The rounding of a recipe; `delayed` is not emulated (`precision.check_available` says so before)."""
        assert config.recipe in ("blockwise", "tensorwise"), config.recipe
        return cls(config.recipe == "tensorwise", "e5m2" if config.format == "hybrid" else "e4m3")

    def weight(self, weight_nk: torch.Tensor) -> torch.Tensor:
        """A weight as FP8 sees it, in its own type: exactly with block-wise scaling, rounded once more with tensor-wise."""
        return self.operand(weight_nk, WEIGHT_BLOCK).to(weight_nk.dtype)

    def operand(self, tensor: torch.Tensor, block: Block, format: Format = "e4m3") -> torch.Tensor:
        """A matrix as FP8 sees it, in the type that its products are to be computed in."""
        if self.tensorwise:
            whole = (max(1, tensor.shape[0]), max(1, tensor.shape[1]))
            return round_trip(tensor, whole, format, power_of_two=False, dtype=torch.float32)
        return round_trip(tensor, block, format, power_of_two=True, dtype=tensor.dtype)


class _Fp8Product(torch.autograd.Function):
    """x [..., k] and W [n, k] to x W^T [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_nk: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        x_tk = x.reshape(-1, x.shape[-1])
        rounded_nk = rounding.operand(weight_nk, WEIGHT_BLOCK)
        y_tn = rounding.operand(x_tk, ROW_BLOCK) @ rounded_nk.t()
        ctx.save_for_backward(x, rounded_nk)
        ctx.rounding = rounding
        return y_tn.to(x.dtype).view(*x.shape[:-1], weight_nk.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, rounded_nk = ctx.saved_tensors
        operand, gradients = ctx.rounding.operand, ctx.rounding.gradients
        dy_tn = dy.reshape(-1, dy.shape[-1])
        dx = dweight_nk = None
        if ctx.needs_input_grad[0]:
            dx = (operand(dy_tn, ROW_BLOCK, gradients) @ rounded_nk).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            x_tk = operand(x.reshape(-1, x.shape[-1]), COLUMN_BLOCK)
            dweight_nk = (operand(dy_tn, COLUMN_BLOCK, gradients).t() @ x_tk).to(x.dtype)
        return dx, dweight_nk, None


class Fp8Linear:
    """What the two classes below add to Megatron's: the product in FP8, and a count of how often it was.

    After the model is built `precision.prepare_layers` gives the layers that run in FP8 their `rounding`; without one a
    layer is Megatron's own. Gradients of weights go through autograd (Megatron's fused accumulation is not used).
    """

    rounding: Rounding | None = None
    forwards = 0
    fp8_forwards = 0

    @property
    def runs_fp8(self) -> bool:
        return self.rounding is not None

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Megatron's hook: the product with this rank's weight, and what its backward must communicate."""
        self.forwards += 1
        if self.rounding is None:
            return super()._forward_impl(input, weight, **settings)
        self.fp8_forwards += 1
        if settings["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=settings["tp_group"]
            )
        elif settings["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=settings["tp_group"])
        output = _Fp8Product.apply(input, weight, self.rounding)
        return output if settings["bias"] is None else output + settings["bias"]


class Fp8ColumnParallelLinear(Fp8Linear, ColumnParallelLinear):
    """Megatron's linear layer whose outputs are divided over the tensor-parallel ranks."""


class Fp8RowParallelLinear(Fp8Linear, RowParallelLinear):
    """Megatron's linear layer whose inputs are divided over the tensor-parallel ranks."""

"""SwiGLU on a CPU, some rows at a time, so that what is between the input and the output stays in the cache.

With s = sigmoid(gate) and an output y = gate s up:

    d up = dy gate s        d gate = dy up s (1 + gate (1 - s))

Megatron's own without fusion adds a zero to one half and glues the halves' gradients together, each a pass over memory; its
fused one is for GPUs, and used there.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch.autograd.function import once_differentiable

PIECE = 2**18
"""Numbers of one half at a time: about what a core's cache holds of them and of what is made of them."""


class SwiGLU(MegatronModule):
    """Megatron's slot for an activation: [..., 2f], gates before what they gate -> [..., f]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half, [..., 2f] -> [..., f], rounded after each of the two as in Hugging Face's layers."""
    if x.device.type != "cpu":
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        x_te = x.reshape(-1, x.shape[-1])
        y_tf = x_te.new_empty(len(x_te), x_te.shape[1] // 2)
        for part, out in _pieces(x_te, y_tf):
            gate, up = part.chunk(2, -1)
            torch.mul(torch.nn.functional.silu(gate), up, out=out)
        ctx.save_for_backward(x_te)
        return y_tf.view(*x.shape[:-1], y_tf.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x_te,) = ctx.saved_tensors
        grad_te = torch.empty_like(x_te)
        for part, slope, out in _pieces(x_te, grad.reshape(-1, grad.shape[-1]), grad_te):
            gate, up = part.chunk(2, -1)
            grad_gate, grad_up = out.chunk(2, -1)
            torch.mul(torch.nn.functional.silu(gate), slope, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(slope * up, gate, grad_input=grad_gate)
        return grad_te.view(*grad.shape[:-1], x_te.shape[1])


def _pieces(x_te: torch.Tensor, *others: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
    """The same rows of all, a piece at a time."""
    rows = max(1, 2 * PIECE // max(1, x_te.shape[1]))
    return zip(*(tensor.split(rows) for tensor in (x_te, *others)))

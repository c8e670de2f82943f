"""RMS normalisation on a CPU, some rows at a time, so that what is between the input and the output stays in the cache.

With r = 1 / sqrt(mean(x^2) + eps), n = r x and an output y = n * w:

    dx = r (dy * w - n mean(dy * w * n))        dw = sum over rows of dy * n

Torch's own is a dozen passes over memory in float32, most of them in backward, which keeps float32 copies of its input.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

ROWS = 256
"""At a time; 256 rows of a few thousand numbers are about what a core's cache holds."""


def rms_norm(x: torch.Tensor, weight_h: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, of any shape [..., h]; in float32, rounded once at the end."""
    if x.device.type != "cpu":
        return torch.nn.functional.rms_norm(x, weight_h.shape, weight_h, eps)
    return _RMSNorm.apply(x, weight_h, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_h, eps):  # type: ignore[no-untyped-def]
        x_th = x.reshape(-1, x.shape[-1])
        y_th = torch.empty_like(x_th)
        scale_t1 = torch.empty(len(x_th), 1)
        weight = weight_h.float()
        for part, out, scale in zip(x_th.split(ROWS), y_th.split(ROWS), scale_t1.split(ROWS)):
            numbers = part.float()
            torch.linalg.vector_norm(numbers, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            out.copy_((numbers * scale).mul_(weight))
        ctx.save_for_backward(x_th, weight_h, scale_t1)
        return y_th.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x_th, weight_h, scale_t1 = ctx.saved_tensors
        grad_x = torch.empty_like(x_th)
        grad_weight = torch.zeros(weight_h.shape)
        weight = weight_h.float()
        parts = (x_th, scale_t1, grad.reshape(x_th.shape), grad_x)
        for part, scale, grad_y, out in zip(*(tensor.split(ROWS) for tensor in parts)):
            normal, slope = part * scale, grad_y.float()
            product = slope * normal
            grad_weight += product.sum(0)
            mean = (product @ weight)[:, None].div_(x_th.shape[-1])
            out.copy_((slope * weight).addcmul_(normal, mean, value=-1).mul_(scale))
        return grad_x.view(grad.shape), grad_weight.to(weight_h.dtype), None

from __future__ import annotations

import pytest
import torch

from megatron_spice.policy.norm_kernel import ROWS, rms_norm


@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 2, 7), (ROWS + 3, 1, 16), (3, 2, 4, 8)])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_norm_and_gradients_match_float64(shape: tuple[int, ...], dtype: torch.dtype, bound: float):
    generator = torch.Generator().manual_seed(0)
    x, grad = ((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(2))
    weight = (torch.randn(shape[-1], generator=generator) + 1).to(dtype)
    mine = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    found = rms_norm(*mine, 1e-5)
    expected = torch.nn.functional.rms_norm(exact[0], weight.shape, exact[1], 1e-5)
    found.backward(grad)
    expected.backward(grad.double())
    assert found.shape == shape and found.dtype == dtype
    for left, right in [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, exact))]:
        assert left.dtype == dtype
        assert (left.double() - right).norm() <= bound * right.norm()


def test_zeros_and_views_are_fine():
    x = torch.randn(4, 2, 16).transpose(0, 1)[..., :8].requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()
    zero = torch.zeros(3, 8, requires_grad=True)
    rms_norm(zero, weight, 1e-6).sum().backward()
    assert torch.equal(rms_norm(zero, weight, 1e-6), torch.zeros(3, 8)) and zero.grad.isfinite().all()

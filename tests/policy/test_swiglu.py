from __future__ import annotations

import pytest
import torch

from megatron_spice.policy.swiglu import PIECE, swiglu


@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 2, 14), (3, 1, PIECE), (0, 6), (4, 2)])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_result_and_gradient_match_float64(shape: tuple[int, ...], dtype: torch.dtype, bound: float):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    found = swiglu(x)
    found.backward(grad)
    expected.backward(grad.double())
    assert found.shape == expected.shape and found.dtype == x.grad.dtype == dtype and x.grad.shape == x.shape
    assert (found.double() - expected).norm() <= bound * expected.norm()
    assert (x.grad.double() - exact.grad).norm() <= bound * exact.grad.norm()


def test_is_what_the_layers_of_hugging_face_compute_bit_for_bit():
    x = torch.randn(700, 2 * 1536, generator=torch.Generator().manual_seed(1)).bfloat16()
    gate, up = x.chunk(2, -1)
    assert torch.equal(swiglu(x), torch.nn.functional.silu(gate) * up)


def test_views_and_extremes_are_fine():
    x = torch.randn(6, 4, 24).transpose(0, 1)[..., :16].requires_grad_()
    swiglu(x).sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()
    far = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], requires_grad=True)
    result = swiglu(far)
    result.sum().backward()
    assert result.tolist() == [[0.0, 3e4]] and far.grad.isfinite().all()

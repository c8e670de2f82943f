"""Tiled vocabulary-parallel log-probabilities and entropies against torch's own log-softmax, values and gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_spice.policy import logprob_kernels, logprobs
from megatron_spice.policy.logprobs import token_logprobs

HIDDEN, VOCAB, PADDED = 8, 11, 16


def _inputs(n: int = 7, vocab: int = VOCAB, padded: int = PADDED, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, HIDDEN, generator=generator)
    weight = torch.randn(padded, HIDDEN, generator=generator)
    weight[vocab:] = 50.0  # padding that would win every softmax if it counted
    return hidden, weight, torch.randint(vocab, (n,), generator=generator)


def _weighted_sum(logprobs: torch.Tensor, entropies: torch.Tensor, with_entropy_grad: bool) -> torch.Tensor:
    factors = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    total = (logprobs * factors).sum()
    return total - (entropies * factors.flip(0)).sum() if with_entropy_grad else total


def _reference(hidden, weight, labels, temperature, vocab=VOCAB, with_entropy_grad=False):
    """In float64, with torch's log-softmax and autograd: [log-probs, entropies, gradient of hidden, gradient of weight]."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_softmax = (hidden @ weight[:vocab].t() / temperature).log_softmax(-1)
    logprobs, entropies = log_softmax.gather(1, labels[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)
    _weighted_sum(logprobs, entropies, with_entropy_grad).backward()
    return [tensor.detach().float() for tensor in (logprobs, entropies, hidden.grad, weight.grad)]


def _ours(hidden, weight, labels, with_entropy_grad=False, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = token_logprobs(hidden, weight, labels, with_entropy_grad=with_entropy_grad, **options)
    assert entropies.requires_grad == with_entropy_grad
    _weighted_sum(logprobs, entropies, with_entropy_grad).backward()
    return [tensor.detach().float() for tensor in (logprobs, entropies, hidden.grad, weight.grad)]


def _check(got, expected, rtol=1e-4, atol=1e-5):
    for ours, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy_grad", [False, True])
def test_equals_log_softmax(chunk, temperature, with_entropy_grad):
    inputs = _inputs()
    ours = _ours(*inputs, temperature=temperature, chunk=chunk, vocab_size=VOCAB, with_entropy_grad=with_entropy_grad)
    _check(ours, _reference(*inputs, temperature, with_entropy_grad=with_entropy_grad))


@given(
    n=st.integers(1, 9), vocab=st.integers(1, 700), padding=st.integers(0, 140), chunk=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.5, 1.7]), with_entropy_grad=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_tile(n, vocab, padding, chunk, temperature, with_entropy_grad, seed):
    inputs = _inputs(n, vocab, vocab + padding, seed)
    ours = _ours(*inputs, temperature=temperature, chunk=chunk, vocab_size=vocab, with_entropy_grad=with_entropy_grad)
    # The entropy that backward reads is rounded at the size of the logits, and its error multiplied by up to 9 / temperature.
    atol = 1e-4 / temperature**2 if with_entropy_grad else 1e-4
    _check(ours, _reference(*inputs, temperature, vocab, with_entropy_grad), atol=atol)


def test_logits_far_apart():
    """A sum that is not rescaled when a larger logit turns up overflows or vanishes."""
    hidden, weight, labels = _inputs(5, 300, 300)
    for order in (1, -1):
        ramp = (torch.linspace(-3, 3, 300) * order)[:, None] * torch.ones(HIDDEN)
        inputs = (hidden.abs() * 4, weight * 0.1 + ramp, labels)
        ours = _ours(*inputs, temperature=1.0, chunk=1, with_entropy_grad=True)
        _check(ours, _reference(*inputs, 1.0, 300, with_entropy_grad=True), atol=1e-3)


def test_bf16_is_rounded_as_whole_logits_are():
    """Errors against float64 like those of plain bf16 logits; and sums over many tiles are rounded once, at their end."""
    hidden, weight, labels = _inputs(64, 3000, 3000)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    _, _, *exact = _reference(hidden.float(), weight.float(), labels, 1.0, 3000)
    theirs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    plain = (theirs[0] @ theirs[1].t()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    _weighted_sum(plain, plain, False).backward()
    many, one = (_ours(hidden, weight, labels, temperature=1.0, chunk=chunk)[2:] for chunk in (2, 64))
    for tiled, whole, other, wanted in zip(many, one, theirs, exact):
        assert (tiled - wanted).norm() < 1.1 * (other.grad.float() - wanted).norm()
        assert (tiled == whole).float().mean() > 0.98


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave back."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("with_entropy_grad", [False, True])
def test_only_a_tile_of_logits_exists_at_a_time(with_entropy_grad):
    """Neither kept for backward nor made on the way, in either direction."""
    n, vocab, chunk = 128, 1024, 16
    inputs = _inputs(n, vocab, vocab)
    with _Largest() as largest:
        _ours(*inputs, temperature=0.7, chunk=chunk, with_entropy_grad=with_entropy_grad)
    assert largest.numel == chunk * vocab


@pytest.mark.parametrize("with_entropy_grad", [False, True])
def test_no_positions_still_run_backward(with_entropy_grad):
    logprobs, entropies, grad_hidden, grad_weight = _ours(
        torch.zeros(0, HIDDEN), torch.ones(PADDED, HIDDEN), torch.zeros(0, dtype=torch.long), with_entropy_grad,
        temperature=1.0, chunk=4,
    )  # fmt: skip
    assert logprobs.shape == entropies.shape == (0,) and grad_hidden.shape == (0, HIDDEN)
    assert not grad_weight.any()


SPLITS = [(7, VOCAB, PADDED, 3), (5, 6, PADDED, 2), (3, 600, 640, 1), (0, VOCAB, PADDED, 4)]  # n, vocab, padded, chunk


def split_vocabulary() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """On each rank: for every case, without and with the entropy's gradient, what this rank's rows of the matrix give."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = []
    for n, vocab, padded, chunk in SPLITS:
        hidden, weight, labels = _inputs(n, vocab, padded)
        rows = padded // size
        options = dict(
            temperature=0.7, chunk=chunk, vocab_start=rank * rows, vocab_size=vocab, group=dist.group.WORLD,
        )  # fmt: skip
        mine = weight[rank * rows : (rank + 1) * rows]
        found.append(tuple(_ours(hidden, mine, labels, with_grad, **options) for with_grad in (False, True)))
    dist.destroy_process_group()
    return found


def test_split_over_ranks():
    """Also when one rank holds nothing but padding, and when there is nothing to predict."""
    for rank, cases in enumerate(run_ranks(2, __file__, "split_vocabulary")):
        for (n, vocab, padded, _), results in zip(SPLITS, cases, strict=True):
            for with_entropy_grad, ours in zip((False, True), results):
                expected = _reference(*_inputs(n, vocab, padded), 0.7, vocab, with_entropy_grad)
                expected[3] = expected[3][rank * padded // 2 : (rank + 1) * padded // 2]
                _check(ours, expected, atol=1e-4)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_what_a_gpu_computes_of_tiles_is_the_softmax_of_all_of_them(with_entropy):
    """The functions that are compiled for CUDA, tile by tile, against autograd over the whole vocabulary."""
    torch.manual_seed(0)
    hidden, weight, labels, temperature = torch.randn(37, 16) * 2, torch.randn(500, 16), torch.randint(0, 500, (37,)), 0.7
    slope, slope_of_entropy = torch.randn(37), torch.randn(37)
    state = (torch.full((37,), -torch.inf), *torch.zeros(3, 37))
    for start in range(0, 500, 128):
        product = hidden @ weight[start : start + 128].t()
        inside, local = logprobs._local_labels(labels, start, min(start + 128, 500))
        state = logprobs._add_tile(state, product, temperature, inside, local, sums=logprob_kernels.sums)
    peak, total, weighted, picked = state
    normaliser = peak + total.log()
    product = (hidden @ weight.t()).requires_grad_()
    wanted = (product / temperature).log_softmax(-1)
    chosen, entropy = wanted.gather(1, labels[:, None])[:, 0], -(wanted.exp() * wanted).sum(-1)
    assert torch.allclose(picked - normaliser, chosen, atol=1e-4)
    assert torch.allclose(normaliser - weighted / total, entropy, atol=1e-4)
    (chosen @ slope + (entropy @ slope_of_entropy if with_entropy else 0)).backward()
    given = (product.detach(), temperature, normaliser, labels, slope)
    if with_entropy:
        found = logprob_kernels.slopes_with_entropy(*given, entropy.detach(), slope_of_entropy)
    else:
        found = logprob_kernels.slopes(*given)
    assert torch.allclose(found, product.grad, atol=1e-5)

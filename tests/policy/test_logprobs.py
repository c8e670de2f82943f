"""Chunked vocabulary-parallel log-probabilities against torch's own log-softmax, values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megatron_spice.policy.logprobs import token_logprobs

HIDDEN, VOCAB, PADDED = 8, 11, 16


def _inputs(n: int = 7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:] = 50.0  # padding that would win every softmax if it counted
    return hidden, weight, torch.randint(VOCAB, (n,), generator=generator)


def _reference(hidden, weight, labels, temperature):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_softmax = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    logprobs = log_softmax.gather(1, labels[:, None])[:, 0]
    (logprobs * torch.arange(1.0, len(labels) + 1)).sum().backward()
    return logprobs.detach(), -(log_softmax.exp() * log_softmax).sum(-1).detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax(chunk, temperature):
    hidden, weight, labels = _inputs()
    ours, mine = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = token_logprobs(ours, mine, labels, temperature=temperature, chunk=chunk, vocab_size=VOCAB)
    (logprobs * torch.arange(1.0, len(labels) + 1)).sum().backward()
    for got, expected in zip((logprobs, entropies, ours.grad, mine.grad), _reference(hidden, weight, labels, temperature)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_split_over_ranks():
    hidden, weight, labels = _inputs()
    expected = _reference(hidden, weight, labels, 0.7)
    results = run_ranks(2, Path(__file__).with_name("on_ranks.py"), "tensor_parallel_logprobs", hidden, weight, labels, VOCAB, 0.7)
    for rank, (logprobs, entropies, grad_hidden, grad_rows) in enumerate(results):
        rows = expected[3][rank * PADDED // 2 : (rank + 1) * PADDED // 2]
        for got, wanted in zip((logprobs, entropies, grad_hidden, grad_rows), (*expected[:3], rows)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_no_positions_still_run_backward():
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.zeros(PADDED, HIDDEN, requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), temperature=1.0, chunk=4)
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()

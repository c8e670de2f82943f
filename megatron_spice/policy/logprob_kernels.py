"""What `logprobs.py` makes of a tile of logits on a GPU: each function reads the tile once and writes only its result.

Written as torch operations one after the other, a tile of float32 goes through memory a dozen times, which took as long as
its matrix products. So torch compiles each of these functions into one kernel or two, for tiles of any size. In bfloat16 as
the product gives them, logits are read at half the bytes; all sums are float32.

Shape suffixes: n positions, v rows of the output matrix in the tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def sums(product_nv: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits z = product / temperature, each float32 [n]: the largest m, the sum of exp(z - m), the sum of z exp(z - m)."""
    logits = product_nv.float() / temperature
    peak_n = logits.amax(-1)
    exponentials = (logits - peak_n[:, None]).exp()
    return peak_n, exponentials.sum(-1), (logits * exponentials).sum(-1)


def slopes(
    product_nv: torch.Tensor,
    temperature: float,
    normaliser_n: torch.Tensor,
    local_n: torch.Tensor,
    grad_n: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the products, in their type: (onehot - p) grad / temperature.

    Args:
        local_n: the label's row in the tile; one outside of it if the label is not there.
    """
    probabilities = (product_nv.float() / temperature - normaliser_n[:, None]).exp()
    rows_v = torch.arange(product_nv.shape[1], device=product_nv.device)
    onehot = (rows_v == local_n[:, None]).float()
    return ((onehot - probabilities) * (grad_n[:, None] / temperature)).to(product_nv.dtype)


def slopes_with_entropy(
    product_nv: torch.Tensor,
    temperature: float,
    normaliser_n: torch.Tensor,
    local_n: torch.Tensor,
    grad_n: torch.Tensor,
    entropy_n: torch.Tensor,
    grad_entropy_n: torch.Tensor,
) -> torch.Tensor:
    """The same where entropies have a gradient too, which adds - grad_entropy p (log p + entropy) / temperature."""
    logprobs = product_nv.float() / temperature - normaliser_n[:, None]
    probabilities = logprobs.exp()
    rows_v = torch.arange(product_nv.shape[1], device=product_nv.device)
    onehot = (rows_v == local_n[:, None]).float()
    of_entropy = grad_entropy_n[:, None] * probabilities * (logprobs + entropy_n[:, None])
    return (((onehot - probabilities) * grad_n[:, None] - of_entropy) / temperature).to(product_nv.dtype)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of the functions above as a kernel for tiles of any size."""
    return torch.compile(function, dynamic=True)

"""Log-probabilities and entropies of chosen tokens under a vocabulary split over ranks, a tile of it at a time.

For hidden states h, output weights W, temperature T and labels y:

    z = h W^T / T      logp(y) = z_y - log sum_v exp(z_v)      H = log sum_v exp(z_v) - sum_v p_v z_v,  p = softmax(z)
    dz = dlogp * (onehot(y) - p) - dH * p * (log p + H)

The logits of a tile, all n positions against some rows of W, live only while the tile is worked on; the softmax's sums
are carried from tile to tile, rescaled when a larger logit turns up. Backward computes the logits again from h and the
saved normaliser, at the price of a second product. Tiles run over the vocabulary and not over positions, because then the
gradient of some rows of W is one matrix product, written once: no float32 copy of the whole matrix is ever needed.

On CPU a tile is worked on in pieces that stay in a core's cache between the passes over them; on CUDA by kernels that pass over
it once or twice (`logprob_kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_spice.policy import logprob_kernels

# A piece on CPU: so many logits (4 MiB of float32), but never fewer rows than matrix products want.
PIECE_LOGITS, PIECE_ROWS = 2**20, 256


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden_nh, weight_vh, labels_n, temperature, tile, real_rows, with_entropy_grad, group
    ):
        zeros_n = torch.zeros(len(labels_n), dtype=torch.float32, device=hidden_nh.device)
        peak_n, total_n, weighted_n, picked_n = zeros_n - torch.inf, zeros_n, zeros_n, zeros_n
        for start, stop in _cut(0, real_rows, _piece(tile, hidden_nh)):
            if hidden_nh.is_cuda:
                state = (peak_n, total_n, weighted_n, picked_n)
                peak_n, total_n, weighted_n, picked_n = _add_tile(
                    state, hidden_nh @ weight_vh[start:stop].t(), temperature, *_local_labels(labels_n, start, stop)
                )
                continue
            logits = _logits(hidden_nh, weight_vh[start:stop], temperature)
            inside_n1, local_n1 = _local_labels(labels_n, start, stop)
            picked_n = picked_n + torch.where(inside_n1, logits.gather(-1, local_n1), 0.0)[:, 0]
            before_n, peak_n = peak_n, torch.maximum(peak_n, logits.amax(-1))
            shrink_n = (before_n - peak_n).exp()
            exponentials = (logits - peak_n[:, None]).exp_()
            total_n = total_n * shrink_n + exponentials.sum(-1)
            weighted_n = weighted_n * shrink_n + logits.mul_(exponentials).sum(-1)
        top_n = _reduce(peak_n.clone(), dist.ReduceOp.MAX, group)
        shrink_n = (peak_n - top_n).exp()  # 0 on a rank whose rows are all padding: its peak is -inf
        sums = torch.stack((total_n * shrink_n, weighted_n * shrink_n, picked_n))
        total_n, weighted_n, picked_n = _reduce(sums, dist.ReduceOp.SUM, group)
        normaliser_n = top_n + total_n.log()
        entropy_n = normaliser_n - weighted_n / total_n
        ctx.save_for_backward(hidden_nh, weight_vh, labels_n, normaliser_n, entropy_n if with_entropy_grad else None)
        ctx.rest = (temperature, tile, real_rows, group)
        if not with_entropy_grad:
            ctx.mark_non_differentiable(entropy_n)
        return picked_n - normaliser_n, entropy_n

    @staticmethod
    def backward(ctx, grad_n, grad_entropy_n):  # type: ignore[no-untyped-def]
        hidden_nh, weight_vh, labels_n, normaliser_n, entropy_n = ctx.saved_tensors
        temperature, tile, real_rows, group = ctx.rest
        grad_n1 = grad_n[:, None] / temperature
        grad_hidden_nh = torch.zeros_like(hidden_nh, dtype=torch.float32)
        grad_weight_vh = torch.empty_like(weight_vh)
        grad_weight_vh[real_rows:] = 0
        for first, last in _cut(0, real_rows, tile):
            if hidden_nh.is_cuda:
                product = hidden_nh @ weight_vh[first:last].t()
                grad_tile = _slopes(product, temperature, labels_n - first, normaliser_n, grad_n, entropy_n, grad_entropy_n)
                torch.mm(grad_tile.t(), hidden_nh, out=grad_weight_vh[first:last])
                _add_product(grad_hidden_nh, grad_tile, weight_vh[first:last], exactly=tile < real_rows)
                continue
            grad_tile = hidden_nh.new_empty(len(hidden_nh), last - first)
            for start, stop in _cut(first, last, _piece(tile, hidden_nh)):
                logprobs = _logits(hidden_nh, weight_vh[start:stop], temperature).sub_(normaliser_n[:, None])
                if entropy_n is None:
                    grad_logits = logprobs.exp_().mul_(-grad_n1)
                else:
                    probabilities = logprobs.exp()
                    grad_logits = logprobs.add_(entropy_n[:, None]).mul_(grad_entropy_n[:, None] / temperature)
                    grad_logits.add_(grad_n1).mul_(probabilities).neg_()
                inside_n1, local_n1 = _local_labels(labels_n, start, stop)
                grad_logits.scatter_add_(-1, local_n1, torch.where(inside_n1, grad_n1, 0.0))
                grad_piece = grad_tile[:, start - first : stop - first].copy_(grad_logits)
                torch.mm(grad_piece.t(), hidden_nh, out=grad_weight_vh[start:stop])
            _add_product(grad_hidden_nh, grad_tile, weight_vh[first:last], exactly=tile < real_rows)
        grad_hidden_nh = _reduce(grad_hidden_nh.to(hidden_nh.dtype), dist.ReduceOp.SUM, group)
        return grad_hidden_nh, grad_weight_vh, None, None, None, None, None, None


def _add_tile(
    state: tuple[torch.Tensor, ...],
    product: torch.Tensor,
    temperature: float,
    inside_n1: torch.Tensor,
    local_n1: torch.Tensor,
    sums: Callable[..., tuple[torch.Tensor, ...]] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The softmax's running peak, sum, weighted sum and the labels' logits, with one more tile. `sums`: what to call in the place
    of the compiled kernel."""
    peak_n, total_n, weighted_n, picked_n = state
    top_n, sum_n, product_n = (sums or logprob_kernels.compiled(logprob_kernels.sums))(product, temperature)
    higher_n = torch.maximum(peak_n, top_n)
    before_n, here_n = (peak_n - higher_n).exp(), (top_n - higher_n).exp()
    picked_n = picked_n + torch.where(inside_n1, product.gather(-1, local_n1).float() / temperature, 0.0)[:, 0]
    return higher_n, total_n * before_n + sum_n * here_n, weighted_n * before_n + product_n * here_n, picked_n


def _slopes(
    product: torch.Tensor,
    temperature: float,
    local_n: torch.Tensor,
    normaliser_n: torch.Tensor,
    grad_n: torch.Tensor,
    entropy_n: torch.Tensor | None,
    grad_entropy_n: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a tile of products, by a compiled kernel."""
    given = (product, temperature, normaliser_n, local_n, grad_n)
    if entropy_n is None:
        return logprob_kernels.compiled(logprob_kernels.slopes)(*given)
    return logprob_kernels.compiled(logprob_kernels.slopes_with_entropy)(*given, entropy_n, grad_entropy_n)


def token_logprobs(
    hidden_nh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_n: torch.Tensor,
    *,
    temperature: float,
    chunk: int,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    with_entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the distribution at n positions.

    Args:
        hidden_nh: [n, h] final hidden states, equal on all ranks of `group`; so is their gradient.
        weight_vh: [v / group size, h] this rank's rows of the output matrix.
        labels_n: [n] token ids whose log-probability is wanted.
        temperature: logits are divided by it, as the sampler did.
        chunk: no more logits exist at a time than `chunk` positions have in the whole vocabulary.
        vocab_start: token id of this rank's first row.
        vocab_size: real vocabulary; rows from there on are padding and get no probability.
        group: tensor-parallel group; None for one rank.
        with_entropy_grad: entropies are differentiable too; costs a second tile of float32.

    Returns:
        float32 [n] log-probabilities (natural log, differentiable) and float32 [n] entropies (nats).
    """
    if labels_n.numel() == 0:
        # Keeps hidden states in the graph, so that a pipeline stage with nothing to predict still runs its backward.
        nothing = (hidden_nh.sum() * 0.0 + weight_vh.sum() * 0.0).float()
        return nothing.expand(0), (nothing if with_entropy_grad else nothing.detach()).expand(0)
    rows = weight_vh.shape[0]
    if vocab_size is None:
        vocab_size = rows * (group.size() if group is not None else 1)
    real_rows = min(max(0, vocab_size - vocab_start), rows)
    tile = _tile(len(labels_n), rows, chunk)
    return _TokenLogprobs.apply(
        hidden_nh, weight_vh, labels_n - vocab_start, temperature, tile, real_rows, with_entropy_grad, group
    )


def _tile(positions: int, rows: int, chunk: int) -> int:
    """Rows of the output matrix worked on at a time."""
    tile = max(1, chunk * rows // positions)
    if tile >= rows:
        return rows
    return tile - tile % 128 if tile > 128 else tile  # what matrix units like


def _piece(tile: int, hidden_nh: torch.Tensor) -> int:
    """Rows of a tile whose logits exist in float32 at a time."""
    return min(tile, max(PIECE_ROWS, PIECE_LOGITS // len(hidden_nh))) if hidden_nh.device.type == "cpu" else tile


def _cut(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, last)) for start in range(first, last, size))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.div_(temperature) if temperature != 1.0 else logits


def _local_labels(labels_n: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels these rows hold, and their row (0 where they hold them not)."""
    inside = (labels_n >= start) & (labels_n < stop)
    return inside[:, None], torch.where(inside, labels_n - start, 0)[:, None]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, exactly: bool) -> None:
    """Adds left @ right to the float32 total; `exactly`: not rounded to their type before, as a sum of several must be."""
    if exactly and left.dtype != torch.float32 and left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif exactly:
        total.addmm_(left.float(), right.float())
    else:
        total += left @ right


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
    return tensor

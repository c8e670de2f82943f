"""Log-probabilities of chosen tokens under a vocabulary that is split over ranks, a chunk of tokens at a time.

For hidden states h, output weights W, temperature T and labels y:

    z = h W^T / T        logp(y) = z_y - log sum_v exp(z_v)        dz = dlogp * (onehot(y) - softmax(z))

The logits of a chunk live only while the chunk is worked on; backward computes them again from h and the saved
normaliser. Peak memory is one chunk's logits instead of the whole row's, at the price of a second matrix multiply.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nh, weight_vh, labels_n, temperature, chunk, vocab_start, vocab_size, group):  # type: ignore[no-untyped-def]
        normalisers, chosen, entropies = [], [], []
        for hidden, labels in zip(hidden_nh.split(chunk), labels_n.split(chunk)):
            logits = _logits(hidden, weight_vh, temperature, vocab_start, vocab_size)
            peak = _reduce(logits.amax(-1), dist.ReduceOp.MAX, group)
            mine, local = _local_labels(labels, vocab_start, weight_vh.shape[0])
            picked = torch.where(mine, logits.gather(-1, local[:, None]).squeeze(-1), 0.0)
            exponentials = (logits - peak[:, None]).exp()
            # exp underflows to 0 where a logit is -inf; its product with the logit must be 0 too.
            weighted = (exponentials * logits.masked_fill(logits == -torch.inf, 0.0)).sum(-1)
            total, picked, weighted = _reduce(
                torch.stack((exponentials.sum(-1), picked, weighted)), dist.ReduceOp.SUM, group
            )
            normaliser = peak + total.log()
            normalisers.append(normaliser)
            chosen.append(picked - normaliser)
            entropies.append(normaliser - weighted / total)
        normaliser_n = torch.cat(normalisers)
        ctx.save_for_backward(hidden_nh, weight_vh, labels_n, normaliser_n)
        ctx.rest = (temperature, chunk, vocab_start, vocab_size, group)
        entropy_n = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_n)
        return torch.cat(chosen), entropy_n

    @staticmethod
    def backward(ctx, grad_n, _):  # type: ignore[no-untyped-def]
        hidden_nh, weight_vh, labels_n, normaliser_n = ctx.saved_tensors
        temperature, chunk, vocab_start, vocab_size, group = ctx.rest
        grad_hidden = torch.empty_like(hidden_nh)
        grad_weight = torch.zeros_like(weight_vh, dtype=torch.float32)
        parts = (hidden_nh, labels_n, normaliser_n, grad_n, grad_hidden)
        for hidden, labels, normaliser, grad, out in zip(*(part.split(chunk) for part in parts)):
            logits = _logits(hidden, weight_vh, temperature, vocab_start, vocab_size)
            grad_logits = logits.sub_(normaliser[:, None]).exp_().neg_()
            mine, local = _local_labels(labels, vocab_start, weight_vh.shape[0])
            grad_logits.scatter_add_(-1, local[:, None], mine[:, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(grad[:, None] / temperature).to(hidden.dtype)
            out.copy_(grad_logits @ weight_vh)
            grad_weight += (grad_logits.t() @ hidden).float()
        _reduce(grad_hidden, dist.ReduceOp.SUM, group)
        return grad_hidden, grad_weight.to(weight_vh.dtype), None, None, None, None, None, None


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the distribution at n positions.

    Args:
        hidden_nh: [n, h] final hidden states, equal on all ranks of `group`.
        weight_vh: [v / group size, h] this rank's rows of the output matrix.
        labels_n: [n] token ids whose log-probability is wanted.
        temperature: logits are divided by it, as the sampler did.
        chunk: positions whose logits exist at a time.
        vocab_start: token id of this rank's first row.
        vocab_size: real vocabulary; rows from there on are padding and get no probability.
        group: tensor-parallel group; None for one rank.

    Returns:
        float32 [n] log-probabilities (natural log, differentiable) and float32 [n] entropies (not differentiable).
    """
    if vocab_size is None:
        vocab_size = weight_vh.shape[0] * (group.size() if group is not None else 1)
    if labels_n.numel() == 0:
        # Keeps hidden states in the graph, so that a pipeline stage with nothing to predict still runs its backward.
        nothing = (hidden_nh.sum() * 0.0 + weight_vh.sum() * 0.0).float()
        return nothing.expand(0), nothing.detach().expand(0)
    return _TokenLogprobs.apply(hidden_nh, weight_vh, labels_n, temperature, chunk, vocab_start, vocab_size, group)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, vocab_start: int, vocab_size: int
) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    if vocab_start + weight.shape[0] > vocab_size:
        logits[:, max(0, vocab_size - vocab_start) :] = -torch.inf
    return logits


def _local_labels(labels: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels this rank's rows hold, and their row (0 where it holds them not)."""
    local = labels - start
    mine = (local >= 0) & (local < count)
    return mine, local.clamp(0, count - 1)


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
    return tensor

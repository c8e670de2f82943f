"""Attention among the tokens of a packed row: by tiles on a CPU, by FlexAttention on CUDA. Both are exact.

Torch's fused attention for CPUs has a fast forward and a backward that takes three times as long, most of it outside of
matrix products. So the forward is torch's, a tile of queries at a time, and the backward is written with matrix products.
With L the log of the softmax's sum over a query's scores, which the forward returns, and O its result,

    P = exp(scale Q K^T - L)     dV = P^T dO     dS = P * (dO V^T - sum(dO * O))     dQ = scale dS K     dK = scale dS^T Q

Both differences come out of one product each, of [scale Q | -L] and [K | 1], and of [dO | -sum(dO * O)] and [V | 1]. In
bfloat16 they are then rounded after the subtraction and not before, when they are near zero wherever P matters. That keeps
gradients as close to the true ones as the fused backward's.

Shape suffixes: q query tokens, k key tokens, b rows (always 1), n heads, g key-value groups, d head size; in comments r
heads of a group, c queries of a tile, m keys of a tile.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megatron_spice.policy import row_mask

TILE_ROWS = 128


def attend(
    query_qbnd: torch.Tensor,
    key_kbgd: torch.Tensor,
    value_kbgd: torch.Tensor,
    codes_q3: torch.Tensor,
    codes_k3: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Softmax attention among the tokens that may see each other.

    Args:
        query_qbnd, key_kbgd, value_kbgd: one type and device; n is a multiple of g.
        codes_q3, codes_k3: integers, see `row_mask.py`; every query sees at least one key. Not to be written to later.
        scale: factor of the scores.

    Returns:
        [q, b, n * d].
    """
    assert query_qbnd.shape[1] == 1, "a packed row is a batch of one"
    if query_qbnd.is_cuda:
        from megatron_spice.policy.flex import flex_attend

        context_qnd = flex_attend(query_qbnd[:, 0], key_kbgd[:, 0], value_kbgd[:, 0], codes_q3, codes_k3, scale)
    else:
        tiles = row_mask.tiles(codes_q3, codes_k3, TILE_ROWS)
        context_qnd = _TiledAttention.apply(query_qbnd[:, 0], key_kbgd[:, 0], value_kbgd[:, 0], tiles, scale)
    return context_qnd.reshape(query_qbnd.shape[0], 1, -1)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_qnd, key_kgd, value_kgd, tiles, scale):  # type: ignore[no-untyped-def]
        context_qnd = torch.empty(query_qnd.shape, dtype=query_qnd.dtype)
        logsum_nq = torch.empty(query_qnd.shape[1], query_qnd.shape[0], dtype=torch.float32)
        key_gkd, value_gkd = key_kgd.transpose(0, 1), value_kgd.transpose(0, 1)
        for tile in tiles:
            here = slice(tile.start, tile.stop)
            # Torch's own dispatch to this kernel keeps the sums to itself.
            out_1ncd, logsum_1nc = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_qnd[here].transpose(0, 1)[None], key_gkd[None, :, tile.keys], value_gkd[None, :, tile.keys],
                attn_mask=_bias(tile, query_qnd.dtype), scale=scale,
            )  # fmt: skip
            context_qnd[here] = out_1ncd[0].transpose(0, 1)
            logsum_nq[:, here] = logsum_1nc[0]
        ctx.save_for_backward(query_qnd, key_kgd, value_kgd, context_qnd, logsum_nq)
        ctx.rest = (tiles, scale)
        return context_qnd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_qnd):  # type: ignore[no-untyped-def]
        query_qnd, key_kgd, value_kgd, context_qnd, logsum_nq = ctx.saved_tensors
        tiles, scale = ctx.rest
        num_queries, heads, size = query_qnd.shape
        num_keys, groups, _ = key_kgd.shape

        def by_group(tensor_qnx: torch.Tensor) -> torch.Tensor:
            """[q, n, x] -> [g, r, q, x]"""
            return tensor_qnx.reshape(num_queries, groups, heads // groups, -1).permute(1, 2, 0, 3)

        def widened(tensor_qnd: torch.Tensor, less_qn1: torch.Tensor) -> torch.Tensor:
            """[q, n, d] beside -less, which takes two columns, by group."""
            high = (-less_qn1).to(tensor_qnd.dtype)
            return by_group(torch.cat([tensor_qnd, high, (-less_qn1 - high).to(tensor_qnd.dtype)], -1))

        def with_ones(tensor_kgd: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor_kgd, tensor_kgd.new_ones(num_keys, groups, 2)], -1).transpose(0, 1)

        left = widened(query_qnd * scale, logsum_nq.t()[..., None])
        slope = widened(grad_qnd, (grad_qnd.float() * context_qnd).sum(-1, keepdim=True))
        key_gkx, value_gkx = with_ones(key_kgd), with_ones(value_kgd)
        grad_query = torch.empty(groups, heads // groups, num_queries, size, dtype=query_qnd.dtype)
        grad_key_gkd = torch.zeros(groups, num_keys, size)
        grad_value_gkd = torch.zeros(groups, num_keys, size)
        for tile in tiles:
            here = slice(tile.start, tile.stop)
            left_gcx, slope_gcx = left[:, :, here].flatten(1, 2), slope[:, :, here].flatten(1, 2)
            weights_gcm = torch.bmm(left_gcx, key_gkx[:, tile.keys].transpose(1, 2))
            by_head = weights_gcm.view(groups, heads // groups, tile.stop - tile.start, -1)
            by_head[..., tile.common :].masked_fill_(~tile.mask, -torch.inf)
            weights_gcm.exp_()
            _add(grad_value_gkd, tile.keys, torch.bmm(weights_gcm.transpose(1, 2), slope_gcx[..., :size]))
            slopes_gcm = torch.bmm(slope_gcx, value_gkx[:, tile.keys].transpose(1, 2)).mul_(weights_gcm)
            part = torch.bmm(slopes_gcm, key_gkx[:, tile.keys, :size])
            grad_query[:, :, here] = part.view(groups, heads // groups, -1, size)
            _add(grad_key_gkd, tile.keys, torch.bmm(slopes_gcm.transpose(1, 2), left_gcx[..., :size]))
        return (
            grad_query.mul_(scale).permute(2, 0, 1, 3).reshape(query_qnd.shape),
            grad_key_gkd.transpose(0, 1).to(key_kgd.dtype),
            grad_value_gkd.transpose(0, 1).to(value_kgd.dtype),
            None,
            None,
        )


def _bias(tile: row_mask.Tile, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the tile's scores, [c, m]: 0 or minus infinity."""
    rows, told_apart = tile.mask.shape
    bias = torch.zeros(rows, tile.common + told_apart, dtype=dtype)
    bias[:, tile.common :].masked_fill_(~tile.mask, -torch.inf)
    return bias


def _add(total_gkd: torch.Tensor, keys: slice | torch.Tensor, part_gmd: torch.Tensor) -> None:
    """total[:, keys] += part, in float32."""
    if isinstance(keys, slice):
        total_gkd[:, keys] += part_gmd
    else:
        total_gkd.index_add_(1, keys, part_gmd.to(total_gkd.dtype))

"""Attention among the tokens of a packed row on CUDA: torch's FlexAttention, told who sees whom by the row's codes.

The kernel works on blocks of 128 queries and 128 keys: it skips those where nothing is visible and asks the codes only in
those that are visible in part. It is compiled once for rows of any length (`dynamic=True`): compiled for one length, it
would be compiled again for every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_spice.policy.row_mask import RowCache

BLOCK = 128
RECOMPILE_LIMIT = 32
"""Kernels for kinds of rows, not lengths: with and without gradients, of one block, shorter than one, each context size. Past
torch's own limit of 8 it would go on without a kernel, writing all scores down."""
OPTIONS = {"BACKEND": "TRITON"}
"""For rows shorter than a block torch would choose its kernel for decoding, which has no configuration for such blocks."""
MASK_ELEMENTS = 2**26  # of the dense mask that exist at a time while blocks are sorted

_BLOCKS: RowCache[BlockMask] = RowCache()


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


def flex_attend(
    query_qnd: torch.Tensor,
    key_kgd: torch.Tensor,
    value_kgd: torch.Tensor,
    codes_q3: torch.Tensor,
    codes_k3: torch.Tensor,
    scale: float,
    kernel: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """[q, n, d]; see `attention_kernels.attend`. `kernel`: what to call in the place of the compiled FlexAttention."""
    blocks = _BLOCKS.get(codes_q3, codes_k3, lambda: block_mask(codes_q3, codes_k3))
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_qnd, key_kgd, value_kgd))
    context = (kernel or _compiled())(
        query, key, value, block_mask=blocks, scale=scale, enable_gqa=True, kernel_options=OPTIONS
    )
    return context[0].transpose(0, 1)


def block_mask(codes_q3: torch.Tensor, codes_k3: torch.Tensor) -> BlockMask:
    """Which blocks are visible, wholly or in part. Unlike torch's `create_block_mask` it never holds the mask of all
    queries and keys, which for a row of 64k tokens would take 4 GiB."""
    place_q, place_k, end_k = spans(codes_q3, codes_k3)
    partial, full = _sort_blocks(place_q, place_k, end_k)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (place_k[key] <= place_q[query]) & (place_q[query] < end_k[key])

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(codes_q3), len(codes_k3))
    )


def spans(codes_q3: torch.Tensor, codes_k3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each query's place, and of each key the places from which it is seen: from its own up to the end of its completion, or,
    in a prompt, of the prompt's last completion. All int32.

    A row's prompt and completions stand one behind the other, so two comparisons say what `dense_mask` needs five for. That
    is asked of every pair of tokens in blocks that are visible in part.
    """
    prompt_k, leaf_k, place_k = codes_k3.unbind(-1)
    last_k = torch.where(leaf_k == -1, _last_place(prompt_k, place_k), _last_place(leaf_k, place_k))
    return tuple(each.to(torch.int32).contiguous() for each in (codes_q3[:, 2], place_k, last_k + 1))


def _last_place(owner_k: torch.Tensor, place_k: torch.Tensor) -> torch.Tensor:
    """For each token the last place of any with the same owner."""
    number_k = owner_k - owner_k.min()  # padding counts down from -1, and there is never more of it than a row's multiple
    last = torch.zeros(int(number_k.max()) + 1, dtype=place_k.dtype, device=place_k.device)
    return last.scatter_reduce_(0, number_k, place_k, "amax")[number_k]


def _sort_blocks(
    place_q: torch.Tensor, place_k: torch.Tensor, end_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [query blocks, key blocks] twice: visible in part, visible wholly. What stands over at the end of a row is
    invisible, so a last block that is not whole is never visible wholly."""
    key_blocks = -(-len(place_k) // BLOCK)
    rows = max(1, MASK_ELEMENTS // (key_blocks * BLOCK * BLOCK)) * BLOCK
    counts = []
    for places in place_q.split(rows):
        query_blocks = -(-len(places) // BLOCK)
        mask = places.new_zeros(query_blocks * BLOCK, key_blocks * BLOCK, dtype=torch.bool)
        mask[: len(places), : len(place_k)] = (place_k <= places[:, None]) & (places[:, None] < end_k)
        counts.append(mask.view(query_blocks, BLOCK, key_blocks, BLOCK).sum((1, 3), dtype=torch.int32))
    count = torch.cat(counts)
    full = count == BLOCK * BLOCK
    return (count > 0) & ~full, full


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row of `blocks` are set, int32 [1, 1, rows], and which, those first, [1, 1, rows, columns]."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

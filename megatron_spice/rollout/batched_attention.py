"""Attention over a paged KV cache for a batch of requests, in plain torch: what `cpu_attention.py` gives to SGLang.

Requests with one query token are computed together: their cache slots are gathered into [requests, longest, heads,
width], what is too long for a request is masked, and the query heads that share a key head become the rows of one small
product. Requests with more query tokens are computed one at a time, for their own queries only. Which slots and which
mask is the same for all layers, so `plan_step` works it out once a step and `attend` runs per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Singles:
    """Requests with one query token: `queries` [n] places among the step's tokens, `slots` [n, longest] of the cache,
    `mask` [n, 1, 1, longest], 0 or -inf, or None when all are equally long."""

    queries: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Stretch:
    """A request with query tokens `start` to `end` (exclusive) of the step; `slots` [length] of the cache; `mask`
    [end - start, length], None when nothing was cached and plain causal attention will do."""

    start: int
    end: int
    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Step:
    """What all layers of one forward pass share."""

    singles: Singles | None = None
    stretches: list[Stretch] = field(default_factory=list)


def plan_step(
    req_to_token: torch.Tensor, rows: torch.Tensor, lengths: list[int], queries: list[int], dtype: torch.dtype
) -> Step:
    """Sorts a step's requests.

    Args:
        req_to_token: [any, longest possible] cache slots of each request's tokens.
        rows: [requests] where in `req_to_token` each request is.
        lengths: tokens of each request, those of this step included.
        queries: tokens of each request in this step, the last ones.
        dtype: of the masks.
    """
    step = Step()
    starts = [sum(queries[:i]) for i in range(len(queries))] if max(queries) > 1 else list(range(len(queries)))
    single = [i for i, count in enumerate(queries) if count == 1]
    if single:
        length = torch.tensor([lengths[i] for i in single])
        longest = int(length.max())
        slots = req_to_token[rows[single], :longest].long()
        beyond = torch.arange(longest) >= length[:, None]
        # A slot beyond a request's end may hold anything, and 0 * NaN is NaN: read its first token there instead.
        slots = torch.where(beyond, slots[:, :1], slots)
        mask = None
        if bool(beyond.any()):
            mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None, :]
        step.singles = Singles(torch.tensor([starts[i] for i in single]), slots, mask)
    for i, count in enumerate(queries):
        if count > 1:
            cached = lengths[i] - count
            mask = None
            if cached:
                seen = torch.ones(count, lengths[i], dtype=torch.bool).tril(cached)
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
            slots = req_to_token[rows[i], : lengths[i]].long()
            step.stretches.append(Stretch(starts[i], starts[i] + count, slots, mask))
    return step


def attend(
    step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention of one layer: `query` [tokens, query heads, width], `keys` and `values` [slots, key heads, width];
    returns [tokens, query heads, width of a value]."""
    heads, key_heads = query.shape[1], keys.shape[1]
    output = query.new_empty(query.shape[0], heads, values.shape[2])
    if step.singles is not None:
        rows = step.singles
        # The query heads of one key head side by side, as if they were query positions.
        grouped = query[rows.queries].unflatten(1, (key_heads, heads // key_heads))
        attended = scaled_dot_product_attention(
            grouped,
            keys[rows.slots].to(query.dtype).transpose(1, 2),
            values[rows.slots].to(query.dtype).transpose(1, 2),
            attn_mask=rows.mask,
            scale=scale,
        )
        output[rows.queries] = attended.flatten(1, 2)
    for stretch in step.stretches:
        own = query[stretch.start : stretch.end].transpose(0, 1)
        key, value = (
            cache[stretch.slots].to(query.dtype).transpose(0, 1).repeat_interleave(heads // key_heads, dim=0)
            for cache in (keys, values)
        )
        attended = scaled_dot_product_attention(
            own[None], key[None], value[None], attn_mask=stretch.mask, is_causal=stretch.mask is None, scale=scale
        )
        output[stretch.start : stretch.end] = attended[0].transpose(0, 1)
    return output

"""The batched attention against one request at a time, computed the plain way. The server's tests hold it end to end."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.rollout.batched_attention import attend, plan_step

requests = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.just(1), st.integers(1, 6))), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(requests, st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(0, 2**31))
def test_each_request_attends_to_its_own_past(requests: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query_heads, key_heads = heads
    lengths = [cached + new for cached, new in requests]
    queries = [new for _, new in requests]
    table = torch.randperm(len(requests) * 16, generator=generator).view(len(requests), 16).int()
    rows = torch.randperm(len(requests), generator=generator)
    keys, values = (torch.randn(len(requests) * 16, key_heads, 8, generator=generator) for _ in range(2))
    query = torch.randn(sum(queries), query_heads, 8, generator=generator)
    used = torch.cat([table[row, :length] for row, length in zip(rows, lengths)]).long()
    unused = torch.ones(len(keys), dtype=torch.bool).index_fill(0, used, False)
    keys[unused] = values[unused] = float("nan")  # whatever lies there must not matter

    step = plan_step(table, rows, lengths, queries, torch.float32)
    found = attend(step, query, keys, values, 0.3)

    start = 0
    for row, length, new in zip(rows, lengths, queries):
        slots = table[row, :length].long()
        key, value = (cache[slots].repeat_interleave(query_heads // key_heads, 1) for cache in (keys, values))
        scores = 0.3 * torch.einsum("qhd,khd->hqk", query[start : start + new], key)
        scores += torch.full((new, length), float("-inf")).triu(length - new + 1)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        torch.testing.assert_close(found[start : start + new], expected, atol=1e-5, rtol=1e-4)
        start += new

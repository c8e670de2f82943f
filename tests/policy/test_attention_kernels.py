from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.policy import row_mask
from megatron_spice.policy.attention_kernels import attend

ROOT = Path(__file__).resolve().parents[2]
HEADS, GROUPS, SIZE = 4, 2, 8


def codes_of(blocks: list[tuple[int, list[int]]], padding: int = 0) -> torch.Tensor:
    """Codes [s, 3] of a row: each block a prompt's length and its completions'."""
    prompts, leaves, leaf = [], [], 0
    for number, (prompt, completions) in enumerate(blocks):
        prompts += [number] * prompt
        leaves += [-1] * prompt
        for length in completions:
            prompts += [number] * length
            leaves += [leaf] * length
            leaf += 1
    prompts += range(-1, -1 - padding, -1)
    leaves += [-1] * padding
    return torch.tensor([prompts, leaves, range(len(prompts))]).t().contiguous()


ROWS = st.builds(
    codes_of,
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), max_size=4)), min_size=1, max_size=4),
    st.integers(0, 5),
)


def of_rank(codes_k3: torch.Tensor, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of a context-parallel rank, and all keys in the order in which ranks hold them (an early and a late piece)."""
    pieces = codes_k3[: len(codes_k3) // (2 * size) * 2 * size].chunk(2 * size)
    gathered = torch.cat([torch.cat((pieces[index], pieces[-1 - index])) for index in range(size)])
    return gathered.chunk(size)[rank], gathered


def tensors(queries: int, keys: int, dtype: torch.dtype, scale: float = 1.5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(queries, 1, HEADS, SIZE), (keys, 1, GROUPS, SIZE), (keys, 1, GROUPS, SIZE), (queries, 1, HEADS * SIZE)]
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, in float64."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->nqk", query, key) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("nqk,kbnd->qbnd", weights, value).flatten(2)


def assert_matches_the_reference(codes_q3: torch.Tensor, codes_k3: torch.Tensor, dtype: torch.dtype, bound: float) -> None:
    """Result and gradients against the reference; `bound` is of the norm of the error, relative."""
    *inputs, grad = tensors(len(codes_q3), len(codes_k3), dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*exact, row_mask.dense_mask(codes_q3, codes_k3), 0.3)
    found = attend(*mine, codes_q3, codes_k3, 0.3)
    expected.backward(grad.double())
    found.backward(grad)
    assert found.shape == (len(codes_q3), 1, HEADS * SIZE) and found.dtype == dtype
    for left, right in [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, exact))]:
        assert left.isfinite().all()
        # A query that sees one key has no gradient; what rounding leaves there counts against unit gradients.
        assert (left.double() - right).norm() <= bound * max(right.norm(), left.numel() ** 0.5 / 10)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_rows_match_the_definition(codes: torch.Tensor):
    assert_matches_the_reference(codes, codes, torch.float32, 5e-6)


@settings(max_examples=30, deadline=None)
@given(ROWS.filter(lambda codes: len(codes) >= 8), st.sampled_from([(0, 2), (1, 2), (1, 4)]))
def test_parts_of_rows_match_the_definition(codes: torch.Tensor, rank: tuple[int, int]):
    codes_q3, codes_k3 = of_rank(codes, *rank)
    if len(codes_q3):
        assert_matches_the_reference(codes_q3, codes_k3, torch.float32, 5e-6)


@pytest.mark.parametrize("blocks", [[(160, [32] * 8)], [(160, [32])] * 8, [(400, [30, 60, 45, 0, 200])], [(1, [])]])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_rows_of_real_lengths(blocks: list[tuple[int, list[int]]], dtype: torch.dtype, bound: float):
    codes = codes_of(blocks, padding=3)
    assert_matches_the_reference(codes, codes, dtype, bound)


def test_large_scores_neither_overflow_nor_vanish():
    codes = codes_of([(20, [10, 10])])
    query, key, value, grad = (tensor.requires_grad_() for tensor in tensors(40, 40, torch.bfloat16, scale=60.0))
    attend(query, key, value, codes, codes, 1.0).backward(grad.detach())
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))
    assert value.grad.abs().max() > 0


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 64), st.booleans())
def test_tiles_are_the_mask(codes: torch.Tensor, rows: int, split: bool):
    codes_q3, codes_k3 = of_rank(codes, 0, 1) if split else (codes, codes)
    if not len(codes_q3):
        return
    covered = torch.zeros(len(codes_q3), len(codes_k3), dtype=torch.bool)
    place = 0
    for tile in row_mask.tiles(codes_q3, codes_k3, rows):
        assert tile.start == place and 0 < tile.stop - tile.start <= rows
        place = tile.stop
        keys = torch.arange(len(codes_k3))[tile.keys]
        covered[tile.start : tile.stop, keys[: tile.common]] = True
        covered[tile.start : tile.stop, keys[tile.common :]] = tile.mask
    assert place == len(codes_q3)
    assert torch.equal(covered, row_mask.dense_mask(codes_q3, codes_k3))


def test_tiles_follow_prompts_and_completions():
    """What is computed and then masked stays small: here a causal mask's half at most."""
    for blocks, stops in (
        ([(160, [32] * 8)], [80, 160, 288, 416]),  # completions together, apart from their prompt
        ([(160, [32])] * 2, [96, 192, 288, 384]),  # a prompt and its only completion are one sequence
        ([(5, [3, 3])] * 6, [63, 66]),  # short ones together
    ):
        codes = codes_of(blocks)
        found = row_mask.tiles(codes, codes, 128)
        assert [tile.stop for tile in found] == stops
        computed = sum((tile.stop - tile.start) * (tile.common + tile.mask.shape[1]) for tile in found)
        assert computed <= max(0.55 * len(codes) ** 2, 128**2)


def test_what_was_made_of_a_row_is_kept_while_its_memory_is():
    made = []
    cache: row_mask.RowCache[int] = row_mask.RowCache(size=2)

    def make() -> int:
        made.append(1)
        return len(made)

    first, second, third = (codes_of([(length, [2])]) for length in (3, 4, 5))
    assert cache.get(first, first, make) == cache.get(first.detach(), first.view(first.shape), make) == 1
    assert cache.get(first[:2], first, make) == 2  # other queries
    assert cache.get(second, second, make) == 3  # `first` with all its queries is the oldest and goes
    assert len(cache.kept) == 2
    assert cache.get(first, first, make) == 4
    places = {first.data_ptr(), second.data_ptr(), third.data_ptr()}
    assert len(places) == 3
    row_mask.forget_rows()
    assert not cache.kept and cache.get(first, first, make) == 5


def test_flex_blocks_are_the_mask():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    from megatron_spice.policy import flex

    codes = codes_of([(200, [100, 3, 130]), (40, [10])], padding=7)
    for codes_q3, codes_k3 in ((codes, codes), of_rank(codes, 1, 2)):
        size = (len(codes_q3), len(codes_k3))
        mine = flex.block_mask(codes_q3, codes_k3)
        assert torch.equal(create_mask(mine.mask_mod, 1, 1, *size, "cpu")[0, 0], row_mask.dense_mask(codes_q3, codes_k3))
        theirs = create_block_mask(mine.mask_mod, 1, 1, *size, "cpu")
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_indices"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_flex_blocks_do_not_depend_on_the_memory_they_are_made_in(monkeypatch: pytest.MonkeyPatch):
    from megatron_spice.policy import flex

    codes = codes_of([(300, [100, 3, 130])])
    whole = flex.block_mask(codes, codes)
    monkeypatch.setattr(flex, "MASK_ELEMENTS", 1)
    assert torch.equal(whole.kv_indices, flex.block_mask(codes, codes).kv_indices)


FLEX_PROGRAM = """
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention.flex_attention import flex_attention
from test_attention_kernels import GROUPS, HEADS, codes_of, of_rank, tensors
from megatron_spice.policy.attention_kernels import attend
from megatron_spice.policy.flex import flex_attend

compiled = []
def count(graph, example):
    compiled.append(1)
    return aot_eager(graph, example)

kernel = torch.compile(flex_attention, dynamic=True, backend=count)
for length in (3, 40, 128, 130, 200, 301, 333, 512):
    codes = codes_of([(length, [70, 3]), (20, [9])], padding=length % 4)
    for codes_q3, codes_k3 in ((codes, codes), of_rank(codes, 1, 2)):
        query, key, value, _ = tensors(len(codes_q3), len(codes_k3), torch.float32)
        with torch.no_grad():
            found = flex_attend(query[:, 0], key[:, 0], value[:, 0], codes_q3, codes_k3, 0.3, kernel=kernel)
        expected = attend(query, key, value, codes_q3, codes_k3, 0.3)
        assert torch.allclose(found.flatten(1), expected[:, 0], atol=1e-5)
assert len(compiled) <= 8, compiled  # of 16 pairs of lengths
"""


def test_flex_attention_agrees_and_is_not_compiled_for_each_length():
    """In a process of its own, where nothing has switched torch.compile off. FlexAttention has no backward on a CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", FLEX_PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

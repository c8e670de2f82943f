"""The block quantiser, bit for bit, against one written from the definition: loops, and all numbers of a format in a list."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.weights import fp8

BIAS = {"e4m3": 7, "e5m2": 15}
MANTISSA = {"e4m3": 3, "e5m2": 2}
F32 = np.float32
F32_MAX = float(np.finfo(np.float32).max)


def numbers(format: str) -> list[float]:
    """Every finite number >= 0 of a format; its place in the list is its code."""
    bits = MANTISSA[format]
    codes = range(0x7F if format == "e4m3" else 0x7C)  # above: NaN, and infinity where the format has one
    found = []
    for code in codes:
        exponent, mantissa = code >> bits, code & (2**bits - 1)
        hidden = 1 if exponent else 0
        found.append((hidden + mantissa / 2**bits) * 2.0 ** (max(exponent, 1) - BIAS[format]))
    return found


NUMBERS = {format: numbers(format) for format in BIAS}


def code_of(value: float, format: str) -> int | None:
    """Nearest code, ties to the even one, saturating; None for NaN."""
    if math.isnan(value):
        return None
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    table, size = NUMBERS[format], abs(value)
    if size >= table[-1]:
        return sign + len(table) - 1
    above = bisect.bisect_right(table, size)
    below = above - 1
    down, up = size - table[below], table[above] - size  # exact: doubles have bits to spare
    if down != up:
        return sign + (below if down < up else above)
    return sign + (below if below % 2 == 0 else above)


def reference_scale(values: list[float], format: str, power_of_two: bool) -> np.float32:
    amax = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    if amax == 0 or math.isinf(amax):
        return F32(1)
    with np.errstate(over="ignore"):
        scale = F32(NUMBERS[format][-1]) / F32(amax)
    if np.isinf(scale):
        scale = F32(F32_MAX)
    return F32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


def reference(array: np.ndarray, block: tuple[int, int], format: str, power_of_two: bool) -> tuple[list, np.ndarray]:
    """Codes (None: NaN) and scale_inv."""
    rows, columns = array.shape
    codes: list[list[int | None]] = [[None] * columns for _ in range(rows)]
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    scale_inv = np.empty(grid, np.float32)
    for down in range(grid[0]):
        for across in range(grid[1]):
            cells = [
                (row, column)
                for row in range(down * block[0], min((down + 1) * block[0], rows))
                for column in range(across * block[1], min((across + 1) * block[1], columns))
            ]
            scale = reference_scale([float(array[cell]) for cell in cells], format, power_of_two)
            scale_inv[down, across] = F32(1) / scale
            for row, column in cells:
                codes[row][column] = code_of(float(array[row, column] * scale), format)
    return codes, scale_inv


def check(array: np.ndarray, block: tuple[int, int], format: str, power_of_two: bool, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(array).to(dtype)
    values, scale_inv = fp8.quantise(tensor, block, format, power_of_two)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, expected_inv = reference(tensor.float().numpy(), block, format, power_of_two)
    assert scale_inv.dtype == torch.float32 and values.dtype == fp8.DTYPES[format]
    assert (scale_inv.numpy().view(np.uint32) == expected_inv.view(np.uint32)).all()
    nan = torch.tensor([[code is None for code in row] for row in codes]).view(array.shape)
    wanted = torch.tensor([[code or 0 for code in row] for row in codes], dtype=torch.uint8).view(array.shape)
    assert (values.float().isnan() == nan).all()
    assert (values.view(torch.uint8)[~nan] == wanted[~nan]).all()

    back = fp8.dequantise(values, scale_inv, block).numpy()
    for (row, column), number in np.ndenumerate(back):
        code = codes[row][column]
        if code is None:
            assert np.isnan(number)
            continue
        sign = F32(-1 if code & 0x80 else 1)
        with np.errstate(over="ignore"):
            expected = sign * F32(NUMBERS[format][code & 0x7F]) * expected_inv[row // block[0], column // block[1]]
        assert number.view(np.uint32) == expected.view(np.uint32)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    """A matrix of numbers near each other, some of them replaced by anything that float32 can hold, and a block."""
    block = draw(st.sampled_from([(1, 1), (2, 3), (3, 2), (1, 4), (4, 1), (1, 128), (128, 1), (128, 128)]))
    rows = draw(st.integers(1, 130 if block[0] == 128 else 7))
    columns = draw(st.integers(1, 130 if block[1] == 128 and rows < 8 else 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    exponent, spread = draw(st.integers(-149, 126)), draw(st.sampled_from([0, 3, 12, 40]))
    scales = 2.0 ** np.clip(exponent - rng.uniform(0, spread, (rows, columns)), -1000, 1000)
    array = np.clip(rng.uniform(-2, 2, (rows, columns)) * scales, -F32_MAX, F32_MAX).astype(np.float32)
    for value in draw(st.lists(st.floats(width=32), max_size=4)):
        array[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = value
    return array, block


@settings(max_examples=150)
@given(
    case=matrices(),
    format=st.sampled_from(["e4m3", "e5m2"]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    slab=st.sampled_from([1, 300, 2**19]),
)
def test_any_matrix_is_quantised_as_defined(case, format, power_of_two, dtype, slab):
    array, block = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "SLAB", slab)
        check(array, block, format, power_of_two, dtype)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_number_tie_and_neighbour_rounds_right(format):
    """A block whose largest value is the format's has scale 1, so the rounding itself shows."""
    table = np.array(NUMBERS[format], np.float32)
    ties = (table[1:] + table[:-1]) / 2  # exact in float32
    points = np.concatenate([table, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf)), table[-1:]])
    array = np.concatenate([points, -points])[None]
    check(array, (1, array.shape[1]), format, True, torch.float32)
    assert fp8.quantise(torch.from_numpy(array), (1, array.shape[1]), format)[1].item() == 1.0


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_corner_values(format, power_of_two):
    tiny, huge = 2.0**-149, F32_MAX
    rows = [
        [0.0, -0.0, 0.0], [tiny, 0.0, -tiny], [2.0**-126, tiny, 3 * tiny], [1e-38, -2e-38, 1e-36], [huge, -huge, 1.0],
        [math.inf, 1.0, -1e9], [-math.inf, 0.0, tiny], [math.nan, 2.0, 3.0], [math.nan, math.nan, math.nan],
        [math.nan, math.inf, 1.0], [448.0, 449.0, -464.0], [57344.0, 61440.0, -65536.0], [1e-30, 1e30, 1.0],
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        check(np.array(rows, np.float32), (1, 3), format, power_of_two, dtype)


def test_infinities_are_saturated_and_their_block_is_not_scaled():
    values, scale_inv = fp8.quantise(torch.tensor([[math.inf, -math.inf, 3.0, math.nan]]), (1, 4), "e5m2")
    assert scale_inv.item() == 1.0
    assert values.float()[0, :3].tolist() == [57344.0, -57344.0, 3.0] and values.float()[0, 3].isnan()


def test_a_bfloat16_weight_and_its_float32_copy_are_the_same():
    weight = (torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    for power_of_two in (True, False):
        one, two = (fp8.quantise(w, power_of_two=power_of_two) for w in (weight, weight.float()))
        assert torch.equal(one[0].view(torch.uint8), two[0].view(torch.uint8)) and torch.equal(one[1], two[1])


def test_blocks_of_a_weight_are_its_corners_too():
    """300 x 200 in 128 x 128 blocks: each factor fits its own block, partial ones included, and the error is bounded."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    weight[256:, 128:] *= 1000
    values, scale_inv = fp8.quantise(weight)
    assert scale_inv.shape == (3, 2) and values.shape == (300, 200)
    assert scale_inv[2, 1] > 100 * scale_inv[:2].max()
    error = (fp8.dequantise(values, scale_inv) - weight).abs()
    smallest = scale_inv.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200] * 2.0**-9
    assert (error <= torch.maximum(weight.abs() / 16, smallest / 2)).all()


def test_powers_of_two_are_exact_in_bfloat16():
    for format in ("e4m3", "e5m2"):
        values, scale_inv = fp8.quantise(torch.randn(130, 260) * 1e-3, fp8.ROW_BLOCK, format)
        exact = fp8.dequantise(values, scale_inv, fp8.ROW_BLOCK)
        assert torch.equal(fp8.dequantise(values, scale_inv, fp8.ROW_BLOCK, torch.bfloat16).float(), exact)
    assert scale_inv.log2().frac().eq(0).all()


def test_a_transposed_weight_has_transposed_blocks():
    weight = torch.randn(200, 300)
    (values, scale_inv), (values_t, scale_inv_t) = fp8.quantise(weight), fp8.quantise(weight.T)
    assert torch.equal(values.view(torch.uint8).T, values_t.view(torch.uint8)) and torch.equal(scale_inv.T, scale_inv_t)


@pytest.mark.parametrize("shape, grid", [((0, 300), (0, 3)), ((5, 0), (1, 0)), ((0, 0), (0, 0))])
def test_nothing_to_quantise(shape, grid):
    values, scale_inv = fp8.quantise(torch.zeros(shape))
    assert values.shape == shape and scale_inv.shape == grid
    assert fp8.dequantise(values, scale_inv).shape == shape


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="float16"):
        fp8.quantise(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        fp8.quantise(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="no elements"):
        fp8.quantise(torch.zeros(2, 2), (0, 128))
    with pytest.raises(ValueError, match=r"\(1, 2\) scales"):
        fp8.dequantise(*fp8.quantise(torch.zeros(2, 200)), fp8.ROW_BLOCK)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block", [fp8.ROW_BLOCK, fp8.WEIGHT_BLOCK])
def test_transformer_engine_gives_the_same_bits(block, format):
    """Needs a GPU of compute capability 9.0 or newer and Transformer Engine."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    pytest.importorskip("transformer_engine.pytorch")
    from importlib import import_module

    constants = import_module("transformer_engine.pytorch.constants")
    blockwise = import_module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    matrix = (torch.randn(304, 272) * 2.0 ** torch.randint(-20, 20, (304, 1))).to("cuda", torch.bfloat16)
    matrix[0, 0], matrix[200, 3], matrix[:, 256:] = math.inf, 0.0, 0.0
    dtype = constants.TE_DType[fp8.DTYPES[format]]
    dims = 1 if block[0] == 1 else 2
    quantizer = blockwise.Float8BlockQuantizer(fp8_dtype=dtype, rowwise=True, columnwise=False, block_scaling_dim=dims)
    empty = quantizer.make_empty(tuple(matrix.shape), dtype=matrix.dtype, device="cuda", requires_grad=False)
    theirs = quantizer.update_quantized(matrix, empty)
    values, scale_inv = fp8.quantise(matrix, block, format)
    scales = theirs._rowwise_scale_inv if block[0] > 1 else theirs._rowwise_scale_inv.T  # padded for the matrix product
    assert torch.equal(theirs._rowwise_data.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scales[: scale_inv.shape[0], : scale_inv.shape[1]], scale_inv)

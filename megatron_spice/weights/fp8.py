"""The block quantiser: a matrix becomes FP8 numbers and one float32 factor for each block of them.

    scale[block]     = largest finite value of the format / largest |x| in the block
    q                = round(x * scale), to the nearest FP8 number, ties to even, saturating
    scale_inv[block] = 1 / scale, so that x is about q * scale_inv

There is one quantiser for everything that is FP8 here: what the policy's emulated layers multiply, and what its engines are
sent. Two quantisers that differ in the last bit would make the trainer and the engines two policies.

The scale is Transformer Engine's (`compute_scale_from_amax` in common/recipe/recipe_common.cuh, recipe
`Float8BlockScaling`), corner for corner:

    power of two      the default there: mantissa bits of the scale are cut off, so that scaling is exact. The FP8 layout
                      of Hugging Face and SGLang (`weight_scale_inv`) takes any float32: `power_of_two=False`
    all zero          scale 1
    NaN               stays NaN, and is passed over in finding the block's largest value
    infinity          scale 1 for its block, and the infinity becomes the format's largest finite number. Nothing infinite
                      leaves the quantiser, so what could produce one is watched for before it (the gradient norm)
    overflowing scale largest float32 (2^127 as a power of two), when the block's largest value is below about 1e-36

All arithmetic is in float32: a bfloat16 tensor and its float32 copy give the same bits. (Transformer Engine caps an
overflowing scale at the largest number of the input's type; the two differ only there, and not for powers of two.)

A value within a sixteenth of float32's largest may be rounded up past it, and comes back from FP8 as an infinity.

Shapes: m, n rows and columns of a matrix; r, c of a block; a partial block at the edge counts as if padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal

import torch

Format = Literal["e4m3", "e5m2"]
Block = tuple[int, int]

WEIGHT_BLOCK: Block = (128, 128)
ROW_BLOCK: Block = (1, 128)
COLUMN_BLOCK: Block = (128, 1)
SLAB = 2**19  # elements

DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantise(
    tensor_mn: torch.Tensor, block: Block = WEIGHT_BLOCK, format: Format = "e4m3", power_of_two: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 numbers [m, n] and their `scale_inv`, float32 [ceil(m / rows), ceil(n / cols)], on the tensor's device.

    Args:
        tensor_mn: bfloat16 or float32, any shape of two dimensions, also with no elements.
        block: (rows, cols) of a block.

    Raises:
        ValueError: not a matrix, another dtype, or a block without elements.
    """
    if tensor_mn.dim() != 2 or tensor_mn.dtype not in (torch.bfloat16, torch.float32):
        what = f"a {tensor_mn.dtype} tensor of shape {tuple(tensor_mn.shape)}"
        raise ValueError(f"{what} cannot be quantised; give a bfloat16 or float32 matrix")
    if min(block) < 1:
        raise ValueError(f"a block of {block} has no elements; give two positive numbers")
    (rows, columns), dtype = tensor_mn.shape, DTYPES[format]
    values_mn = torch.empty(rows, columns, dtype=dtype, device=tensor_mn.device)
    scale_inv = torch.empty(_grid(tensor_mn, block), device=tensor_mn.device)
    for slab, block_rows in _slabs(tensor_mn, block):
        blocks_mrnc = _blocks(tensor_mn[slab].float(), block)
        largest = torch.finfo(dtype).max
        scale_mn = _scales(_largest_values(blocks_mrnc), largest, power_of_two)
        scaled_mrnc = (blocks_mrnc * scale_mn[:, None, :, None]).clamp_(-largest, largest)  # a cast to E5M2 keeps infinities
        values_mn[slab] = _matrix(scaled_mrnc.to(dtype), values_mn[slab].shape)
        scale_inv[block_rows] = 1.0 / scale_mn
    return values_mn, scale_inv


def dequantise(
    values_mn: torch.Tensor, scale_inv: torch.Tensor, block: Block = WEIGHT_BLOCK, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`values_mn * scale_inv`, each block by its own factor, [m, n] of `dtype`, rounded once.

    An FP8 number has at most 4 significant bits, so with powers of two the result is exact in bfloat16 too (unless a
    block's largest value is below about 1e-36, where bfloat16 runs out of exponents).

    Raises:
        ValueError: `scale_inv` has not one number for each block.
    """
    grid = _grid(values_mn, block)
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"{tuple(scale_inv.shape)} scales do not fit a {tuple(values_mn.shape)} matrix in blocks of {block}; it has {grid}"
        )
    tensor_mn = torch.empty(values_mn.shape, dtype=dtype, device=values_mn.device)
    for slab, block_rows in _slabs(values_mn, block):
        blocks_mrnc = _blocks(_decode(values_mn[slab]), block)
        tensor_mn[slab] = _matrix(blocks_mrnc * scale_inv[block_rows, None, :, None], tensor_mn[slab].shape)
    return tensor_mn


def round_trip(
    tensor_mn: torch.Tensor, block: Block, format: Format, power_of_two: bool, dtype: torch.dtype
) -> torch.Tensor:
    """What is left of a matrix after FP8: dequantised numbers [m, n] of `dtype`."""
    return dequantise(*quantise(tensor_mn, block, format, power_of_two), block, dtype)


def _grid(tensor_mn: torch.Tensor, block: Block) -> tuple[int, int]:
    """Blocks down and across."""
    return -(-tensor_mn.shape[0] // block[0]), -(-tensor_mn.shape[1] // block[1])


def _slabs(tensor_mn: torch.Tensor, block: Block) -> Iterator[tuple[slice, slice]]:
    """The matrix in slabs of whole rows of blocks: (its rows, its rows of blocks). On a CPU a slab and all that is computed
    from it stay in the cache, which is four times as fast as going through memory at each step; on CUDA it is one slab."""
    rows, columns = tensor_mn.shape
    height = rows if tensor_mn.is_cuda else max(1, SLAB // (block[0] * max(1, columns))) * block[0]
    for start in range(0, rows, max(1, height)):
        stop = min(start + height, rows)
        yield slice(start, stop), slice(start // block[0], -(-stop // block[0]))


def _blocks(tensor_mn: torch.Tensor, block: Block) -> torch.Tensor:
    """View (a copy only where the edge must be padded) of a matrix as [blocks down, rows, blocks across, columns]."""
    (rows, columns), (height, width), (down, across) = tensor_mn.shape, block, _grid(tensor_mn, block)
    if (down * height, across * width) != (rows, columns):
        tensor_mn = torch.nn.functional.pad(tensor_mn, (0, across * width - columns, 0, down * height - rows))
    return tensor_mn.reshape(down, height, across, width)


def _matrix(blocks_mrnc: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The matrix that `_blocks` took apart, without its padding."""
    down, height, across, width = blocks_mrnc.shape
    return blocks_mrnc.reshape(down * height, across * width)[: shape[0], : shape[1]]


def _largest_values(blocks_mrnc: torch.Tensor) -> torch.Tensor:
    """Largest |x| of each block, NaN passed over (0 where there is nothing else)."""
    amax = _amax(blocks_mrnc.abs())
    if bool(amax.isnan().any()):
        return _amax(torch.where(blocks_mrnc.isnan(), 0.0, blocks_mrnc).abs_())
    return amax


def _amax(blocks_mrnc: torch.Tensor) -> torch.Tensor:
    """[m, n]; two reductions in a row are faster than one over both dimensions, and none than one over a single row."""
    down = blocks_mrnc.squeeze(1) if blocks_mrnc.shape[1] == 1 else blocks_mrnc.amax(1)
    return down.squeeze(-1) if down.shape[-1] == 1 else down.amax(-1)


def _scales(amax: torch.Tensor, largest: float, power_of_two: bool) -> torch.Tensor:
    # A division of tensors: torch turns `number / tensor` into a product with the reciprocal, which rounds twice.
    scale = torch.full_like(amax, largest).div_(amax).clamp_(max=torch.finfo(torch.float32).max)
    if power_of_two:
        exponent_bits = scale.view(torch.int32) & 0x7F800000  # the scale is positive and never subnormal
        scale = exponent_bits.view(torch.float32)
    return torch.where((amax == 0) | amax.isinf(), 1.0, scale)


def _decode(values: torch.Tensor) -> torch.Tensor:
    """FP8 to float32, exactly."""
    if values.is_cuda or values.dtype == torch.float8_e5m2:
        return values.float()
    # On the CPU torch converts E4M3 number by number; looking 256 numbers up takes less than half of the time.
    codes = values.contiguous().view(torch.uint8).reshape(-1).int()
    return _e4m3_numbers().index_select(0, codes).view(values.shape)


@cache
def _e4m3_numbers() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

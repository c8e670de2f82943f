"""What real FP8 needs of a machine, by recipe, and what of it is missing.

One table for those who find the facts in different ways: `doctor` without importing torch, the policy from torch itself.

Transformer Engine: the releases from which Megatron-Core offers a recipe (`fp8_utils.get_fp8_recipe`).
GPU and CUDA: what Transformer Engine asks for (`quantization.py`: `_compute_fp8_support` and
`_compute_fp8_block_scaling_support`); delayed and tensor-wise scaling run from Ada on, block-wise from Hopper on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fp8Needs:
    """Lowest releases, and the lowest compute capability of the GPUs."""

    transformer_engine: Version
    capability: Version
    cuda: Version


NEEDS = {
    "blockwise": Fp8Needs((2, 3), (9, 0), (12, 9)),
    "tensorwise": Fp8Needs((2, 2), (8, 9), (12, 1)),
    "delayed": Fp8Needs((1, 7), (8, 9), (12, 1)),
}
EMULATED = ("blockwise", "tensorwise")


def version_of(text: str | None) -> Version | None:
    """`"2.9.0+abc"` is (2, 9); None where there are no two numbers."""
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def fp8_obstacles(
    recipe: str, transformer_engine: str | None, capability: Version | None, cuda: str | None
) -> list[str]:
    """All that keeps a machine with GPUs from a recipe, each with its remedy; empty if nothing does.

    Args:
        transformer_engine: installed release, None if there is none.
        capability: lowest compute capability of the GPUs, None if unknown (then it is not judged).
        cuda: release of CUDA that torch was built for, None if it was built without.
    """
    needs, found, key = NEEDS[recipe], [], f"policy.fp8.recipe={recipe}"
    engine = f"{key} needs Transformer Engine {_text(needs.transformer_engine)} or newer"
    if transformer_engine is None:
        found.append(f"{engine}, which is not installed: bash install.sh")
    elif (version_of(transformer_engine) or (0, 0)) < needs.transformer_engine:
        found.append(f"{engine}, found {transformer_engine}: bash install.sh")
    if capability is not None and capability < needs.capability:
        others = [f"policy.fp8.recipe={name}" for name in EMULATED if NEEDS[name].capability <= capability]
        found.append(
            f"{key} needs GPUs of compute capability {_text(needs.capability)} or newer, found {_text(capability)}: "
            f"give {' or '.join([*others, 'policy.precision=bf16'])}"
        )
    if (version_of(cuda) or (0, 0)) < needs.cuda:
        found.append(
            f"{key} needs a torch built for CUDA {_text(needs.cuda)} or newer, found {cuda or 'none'}: install one that the "
            "driver supports"
        )
    return found


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"

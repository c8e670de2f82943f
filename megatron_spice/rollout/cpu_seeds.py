"""Sampling by seeds on a CPU engine. Loaded only inside the SGLang server's processes.

With `rollout.deterministic` SGLang adds to each token's log-probability a Gumbel noise that is a hash of (the sample's seed,
the position, the token) and takes the largest: a draw from the distribution that does not depend on what else is in the
batch. On a CPU three things are in the way, each answered by an interface that SGLang has for it:

- its list of attention backends for this mode, which other packages may extend, lacks the CPU's;
- its kernels whose sums do not depend on the batch are Triton's; a hook leaves them out, so that log-probabilities differ in
  the last bits with the batch. That moves a draw only where two tokens are as close as that: hardly ever in float32, now
  and then in bfloat16;
- its hash is a compiled kernel of a package that is not here: the same hash, MurmurHash3 (Appleby, x86, 32 bits), in torch.
"""

from __future__ import annotations

import torch
from torch import library as operators

_LOW = 0xFFFFFFFF
HASH = "murmur_hash32_cpu"
OPERATORS = operators.Library("sgl_kernel", "FRAGMENT")  # kept: its operators go when it does


def allow() -> None:
    """Lets the server start in deterministic mode with the CPU's attention; before its settings are read."""
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])


def register() -> None:
    """Prepares a scheduler's process, before its model is made."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode"
    HookRegistry.register(target, lambda runner: None, HookType.REPLACE)
    HookRegistry.apply_hooks()  # a forked scheduler finds that SGLang has applied its hooks, in the server
    OPERATORS.define(f"{HASH}(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    OPERATORS.impl(HASH, murmur_hash32, "CPU")


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Hashes (seed, position, column) for every seed [n] with its position [n], and every column [m]: int64 [n, m], each
    from 0 to 2**32 - 1."""
    seed, positions, columns = seed.to(torch.int64), positions.to(torch.int64), columns.to(torch.int64)
    state = torch.zeros_like(seed)
    for word in (seed & _LOW, (seed >> 32) & _LOW, positions & _LOW):
        state = _mix(state, word)
    state = _mix(state[:, None], (columns & _LOW)[None, :])
    state = state ^ 16  # bytes hashed
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _LOW
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _LOW
    return state ^ (state >> 16)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    # Products overflow; their low 32 bits are right all the same.
    word = (_rotated((word * 0xCC9E2D51) & _LOW, 15) * 0x1B873593) & _LOW
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & _LOW


def _rotated(word: torch.Tensor, by: int) -> torch.Tensor:
    return ((word << by) | (word >> (32 - by))) & _LOW

"""The model draws nothing at random while it learns, which is why a checkpoint holds no generator's state.

A run that went on with dropout or noisy routing would not be the run that was interrupted: it would draw from the start again.
So whoever adds either is stopped here, where the model is built, and not by a difference that nobody can explain.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

NOISE = "moe_input_jitter_eps"


def assert_draws_nothing(chunks: Sequence[nn.Module]) -> None:
    """Looks for dropout and noise in every layer, and in the settings that layers were made from."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            drawn = _drawn(module)
            assert not drawn, f"{name or 'the model'} draws at random ({', '.join(drawn)}), and checkpoints hold no generator's state"


def _drawn(module: nn.Module) -> list[str]:
    found = [f"p={module.p}"] if isinstance(module, nn.modules.dropout._DropoutNd) and module.p else []
    for owner in (module, getattr(module, "config", None)):
        names = [name for name in getattr(owner, "__dict__", {}) if name.endswith("_dropout") or name == NOISE]
        found += [f"{name}={value}" for name in names if isinstance(value := getattr(owner, name), float | int) and value]
    return list(dict.fromkeys(found))

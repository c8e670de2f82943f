"""What the policy computes again in backward instead of keeping it: memory for time."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import PolicyConfig


def recompute_settings(config: PolicyConfig) -> dict[str, Any]:
    """What `policy.recompute` means to Megatron's TransformerConfig.

    Raises:
        ConfigError: norms are to be recomputed without Transformer Engine, by whose functions Megatron does it.
    """
    if config.recompute == "none":
        return {}
    if config.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if "layernorm" in config.recompute_modules and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "policy.recompute_modules has layernorm, which needs Transformer Engine (not installed here); leave it out"
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(config.recompute_modules)}

"""The one place that knows precisions: what Megatron and the optimiser are told, which layers run in FP8, and what ran.

    fp32  everything in float32
    bf16  weights and activations in bfloat16, float32 master weights in the optimiser
    fp8   as bf16, and the linear layers of the transformer layers multiply FP8 numbers: by Transformer Engine on CUDA, by
          `fp8_linear.py` on a CPU

The embedding, the output matrix, norms, routers and attention itself stay in bfloat16 under every FP8 recipe. A recipe
that is believed to run and does not is worth nothing, so `audit` does not repeat the settings: it reads from the layers
themselves how many of their forwards were FP8 ones.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.fp8_needs import EMULATED, fp8_obstacles, version_of
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.fp8_linear import Fp8Linear, Rounding
from megatron_spice.policy.precision_audit import LayerPrecision, audit_lines
from megatron_spice.weights.gather import Change

__all__ = ["DTYPES", "LayerPrecision", "audit", "audit_lines"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
OUTSIDE = "outside the layers"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here."""
    return transformer_engine()[1] is None


def transformer_engine() -> tuple[str | None, str | None]:
    """Its release (None: not installed) and what keeps it from being imported (None: nothing)."""
    try:
        import transformer_engine.pytorch
    except Exception as error:  # on a wrong driver or CUDA it fails in more ways than ImportError
        try:
            return importlib.metadata.version("transformer-engine"), f"{type(error).__name__}: {error}"
        except importlib.metadata.PackageNotFoundError:
            return None, "not installed"
    return transformer_engine.__version__, None


# -- what others are told ---------------------------------------------------------------------------------------------


def transformer_settings(config: PolicyConfig, emulated: bool) -> dict[str, Any]:
    """FP8's part of Megatron's TransformerConfig; empty without FP8, and where it is emulated.

    The emulation is in the layers. Told of FP8, Megatron would checkpoint activations through Transformer Engine, pad
    what experts get, and compare Transformer Engine's version, all of which fails where there is none.
    """
    if config.precision != "fp8" or emulated:
        return {}
    fp8 = config.fp8
    settings = {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": bool(fp8.first_layers_bf16 or fp8.last_layers_bf16),
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }
    if fp8.recipe == "delayed":
        # Transformer Engine's own defaults; Megatron's is a history of one step.
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def optimizer_settings(config: PolicyConfig) -> dict[str, Any]:
    """FP8's part of Megatron's OptimizerConfig, where a forgotten recipe means `delayed` without a word."""
    return {"fp8_recipe": config.fp8.recipe if config.precision == "fp8" else None}


def token_multiple(config: PolicyConfig, uses_te: bool) -> int:
    """A row's tokens must be a multiple of this for Transformer Engine's FP8 products; 1 elsewhere.

    They sum over tokens (weight gradients), in sixteens of them. Under sequence parallelism each rank quantises its own
    part before it is gathered; block-wise that part must be whole blocks (releases 2.8 to 2.13 assert it, others gather
    in bfloat16 instead).
    """
    if config.precision != "fp8" or not uses_te:
        return 1
    if not config.sequence_parallel or config.tensor_parallel_size == 1:
        return 16 * config.context_parallel_size
    tokens = 128 if config.fp8.recipe == "blockwise" else 16
    return tokens * config.context_parallel_size * config.tensor_parallel_size


def check_available(config: PolicyConfig, architecture: ModelArchitecture, device: torch.device) -> None:
    """Whether this machine can run the precision with the model.

    Raises:
        ConfigError: it cannot; with all that is missing for it.
    """
    if config.precision != "fp8":
        return
    fp8 = config.fp8
    if device.type == "cpu":
        if fp8.recipe not in EMULATED:
            raise ConfigError(
                f"policy.fp8.recipe={fp8.recipe} is not emulated on a CPU; give policy.fp8.recipe={' or '.join(EMULATED)}"
            )
        return
    version, broken = transformer_engine()
    problems = fp8_obstacles(fp8.recipe, version, torch.cuda.get_device_capability(device), torch.version.cuda)
    problems += fp8_size_problems(config, architecture)
    if version and broken:
        problems.append(f"Transformer Engine {version} is installed and cannot be imported ({broken}): bash install.sh")
    if config.recompute == "selective" and "layernorm" in config.recompute_modules:
        if version and (version_of(version) or (0, 0)) < (2, 6):
            problems.append(
                "policy.recompute_modules=layernorm with policy.precision=fp8 needs Transformer Engine 2.6 or newer, found "
                f"{version}; take layernorm out, or update"
            )
    if problems:
        raise ConfigError(problems)


def fp8_size_problems(config: PolicyConfig, architecture: ModelArchitecture) -> list[str]:
    """Sides of matrices that Transformer Engine's FP8 products do not take (pytorch/utils.py, `assert_dim_for_fp8_exec`)."""
    a, tensor = architecture, config.tensor_parallel_size
    heads, keys = a.num_attention_heads * a.head_dim, 2 * a.num_query_groups * a.head_dim
    sides = {
        "hidden_size": a.hidden_size, "heads": heads // tensor, "queries, keys and values": (heads + keys) // tensor,
    }  # fmt: skip
    if a.num_experts is None:
        sides["intermediate_size"] = a.ffn_hidden_size // tensor
    else:
        sides["moe_intermediate_size"] = a.expert_ffn_hidden_size
    return [
        f"policy.precision=fp8: a rank's {name} of {side} is no multiple of 16 (policy.tensor_parallel_size={tensor}); lower "
        "policy.tensor_parallel_size, or give policy.precision=bf16"
        for name, side in sides.items()
        if side % 16
    ]


def assert_recipe_reached(model_config: Any, optimizer_config: Any, config: PolicyConfig, emulated: bool) -> None:
    """That the recipe stands in Megatron's TransformerConfig and OptimizerConfig as they are used, not only in ours."""
    wanted = {"fp8": None} | transformer_settings(config, emulated)
    for name, value in wanted.items():
        found = getattr(model_config, name)
        assert found == value, f"TransformerConfig.{name} is {found}, the recipe says {value}"
    for name, value in optimizer_settings(config).items():
        found = getattr(optimizer_config, name)
        assert found == value, f"OptimizerConfig.{name} is {found}, the recipe says {value}"


# -- the layers -------------------------------------------------------------------------------------------------------


def reason_for_bf16(config: PolicyConfig, layer: int, num_layers: int) -> str:
    """Why global layer `layer` (from 0) is kept out of FP8; empty if it is not."""
    if config.precision != "fp8":
        return f"policy.precision={config.precision}"
    if layer < config.fp8.first_layers_bf16:
        return f"policy.fp8.first_layers_bf16={config.fp8.first_layers_bf16}"
    if layer >= num_layers - config.fp8.last_layers_bf16:
        return f"policy.fp8.last_layers_bf16={config.fp8.last_layers_bf16}"
    return ""


def prepare_layers(chunks: Sequence[torch.nn.Module], config: PolicyConfig) -> None:
    """Tells the emulated linears which of them run in FP8, and has Transformer Engine's counted. Call it once."""
    for _, layer in _layers(chunks):
        kept = reason_for_bf16(config, layer.layer_number - 1, layer.config.num_layers)
        for module in layer.modules():
            if isinstance(module, Fp8Linear):
                module.rounding = None if kept else Rounding.of(config.fp8)
            elif config.precision == "fp8" and _is_engine_linear(module):
                module.forwards = module.fp8_forwards = 0
                module.register_forward_hook(_count)


def rounded_weights(chunks: Sequence[torch.nn.Module], config: PolicyConfig) -> dict[tuple[int, str], Change]:
    """How FP8 products round the weights that they read, by chunk and name; empty for `delayed`, whose factors are Transformer
    Engine's and of the past. Transformer Engine's block-wise weights are the quantiser's (`weights/fp8.py`)."""
    if config.precision != "fp8" or config.fp8.recipe not in EMULATED:
        return {}
    rounding, found = Rounding.of(config.fp8), {}
    for index, chunk in enumerate(chunks):
        for path, layer in _layers([chunk]):
            if reason_for_bf16(config, layer.layer_number - 1, layer.config.num_layers):
                continue
            for name, module in layer.named_modules():
                if isinstance(module, Fp8Linear) or _is_engine_linear(module):
                    for own, parameter in module.named_parameters(recurse=False):
                        if own.startswith("weight") and parameter.dim() == 2:
                            found[index, f"{path}.{name}.{own}"] = rounding.weight
    return found


def _count(module: Any, inputs: Any, output: Any) -> None:
    """Transformer Engine sets `fp8` at the start of a forward to whether it runs in FP8."""
    module.forwards += 1
    module.fp8_forwards += bool(module.fp8)


def _is_engine_linear(module: torch.nn.Module) -> bool:
    """A linear layer of Transformer Engine: its base class gives FP8 state to all its modules, weights or not."""
    return hasattr(module, "fp8_meta") and bool(_matrices(module))


def _matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if name.startswith("weight") and parameter.dim() == 2]


def _layers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, TransformerLayer]]:
    """All transformer layers of this rank by their path in the chunk; `layer_number` is global and counts from 1."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if isinstance(module, TransformerLayer):
                yield path, module


def audit(chunks: Sequence[torch.nn.Module], config: PolicyConfig) -> list[LayerPrecision]:
    """What every module of this rank that multiplies matrices runs in, why, and how often it ran in FP8 so far.

    Names carry the layer's global number from 0: `decoder.layers.17.mlp.linear_fc1`.
    """
    found, inside = [], set()
    for path, layer in _layers(chunks):
        number = layer.layer_number - 1
        kept = reason_for_bf16(config, number, layer.config.num_layers)
        base = f"{path.removeprefix('module.').rpartition('.')[0]}.{number}"
        for name, module in layer.named_modules():
            inside.add(module)
            if _matrices(module) or name.endswith("core_attention"):
                found.append(_judge(f"{base}.{name}", module, config, kept))
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if module not in inside and _matrices(module):
                found.append(_judge(name.removeprefix("module."), module, config, OUTSIDE))
    return found


def _judge(name: str, module: torch.nn.Module, config: PolicyConfig, kept: str) -> LayerPrecision:
    matrices = _matrices(module)
    own = PRECISIONS[matrices[0].dtype if matrices else DTYPES[config.precision]]
    if config.precision != "fp8":
        return LayerPrecision(name, own, f"policy.precision={config.precision}", None, 0)
    if kept != OUTSIDE and not (isinstance(module, Fp8Linear) or _is_engine_linear(module)):
        kept = f"{type(module).__name__} has no FP8 form"
    counts = (module.forwards, module.fp8_forwards) if hasattr(module, "forwards") else (None, 0)
    if kept:
        return LayerPrecision(name, own, kept, *counts)
    return LayerPrecision(name, "fp8", f"{config.fp8.recipe} {config.fp8.format}", *counts)

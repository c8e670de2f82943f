"""Megatron's data-parallel wrapper and distributed optimiser around one stage."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.model import DTYPES, PolicyModel

# Optimiser state is saved in a form that loads into any layout.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def wrap(model: PolicyModel) -> DistributedDataParallel:
    """Gradients in float32, reduced to the rank that owns their part of the optimiser."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
    )
    return DistributedDataParallel(model.config, settings, model)


def build_optimizer(wrapped: DistributedDataParallel, config: PolicyConfig) -> MegatronOptimizer:
    """Adam at a constant learning rate; weight decay spares norms and biases, as Megatron's groups mark them."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.precision == "bf16",
        params_dtype=DTYPES[config.precision],
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    _set_hyperparameters(optimizer, config)
    _start_state(optimizer)
    return optimizer


def _set_hyperparameters(optimizer: MegatronOptimizer, config: PolicyConfig) -> None:
    """The recipe's numbers: Megatron leaves some to a scheduler that a constant rate does not need, and a loaded state
    brings those it was saved with."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any], config: PolicyConfig) -> None:
    """Takes over an optimiser state that was loaded through `sharded_state_dict`; learning rate and the like stay the
    recipe's.

    With torch's Adam (no Transformer Engine, no Apex) Megatron-Core 0.16 cannot do it alone: it looks for a saved `step`
    of each parameter where it has left `step` out, and it gives all parameters one `step` tensor, which torch then
    advances once for each of them. So the moments are loaded while `step` is put aside, and every parameter gets its own.
    """
    parts = _parts(optimizer)
    if not all(_is_torch_adam(part) for part in parts):
        optimizer.load_state_dict(state)
        _set_hyperparameters(optimizer, config)
        return
    for part, saved in zip(parts, [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]):
        part.load_state_dict({key: value for key, value in saved.items() if key != "param_state"})
        inner = part.optimizer.state
        steps = {parameter: inner[parameter].pop("step") for parameter in inner}
        part.load_parameter_state_from_fully_reshardable(saved["param_state"])
        for parameter, step in steps.items():
            inner[parameter]["step"] = step.clone()
    _set_hyperparameters(optimizer, config)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _start_state(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam its zero moments before the first step: Megatron cannot load into, or save, a state not there yet."""
    for part in _parts(optimizer):
        if _is_torch_adam(part):
            for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

"""Megatron's data-parallel wrapper and distributed optimiser around one rank's chunks of the model.

Experts that are shared out over ranks are reduced over other ranks than the rest, so Megatron gives them an optimiser of
their own: what it returns is a chain of one or two. `parts_of` is that chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy import fused
from megatron_spice.policy.precision import DTYPES, optimizer_settings

if TYPE_CHECKING:
    from megatron_spice.policy.model import PolicyModel

# Optimiser state is saved in a form that loads into any layout, under the parameters' own names. It is gathered in host
# memory by one rank of a data-parallel group: on the device and by all, it would be several times the model.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def wrap(chunks: Sequence[PolicyModel], config: PolicyConfig) -> list[DistributedDataParallel]:
    """One wrapper a chunk: gradients in float32, reduced to the rank that owns their part of the optimiser."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    fused.fuse_engine_layers(chunks)
    return wrapped


def build_optimizer(wrapped: Sequence[DistributedDataParallel], config: PolicyConfig) -> MegatronOptimizer:
    """Adam at a constant learning rate; weight decay spares norms and biases, as Megatron's groups mark them.

    Raises:
        ConfigError: the optimiser is to be offloaded from a device that it is not on.
    """
    fused.choose_adam()
    if config.optimizer_offload:
        _check_offload(wrapped, config)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=DTYPES[config.precision] is torch.bfloat16,
        params_dtype=DTYPES[config.precision],
        use_distributed_optimizer=True,
        **optimizer_settings(config),
    )
    if config.optimizer_offload:
        _offload(settings, config)
    optimizer = get_megatron_optimizer(settings, list(wrapped))
    _set_hyperparameters(optimizer, config)
    _start_state(optimizer)
    return optimizer


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimisers of a chain, or the one itself; those without a parameter on this rank left out."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _offload(settings: OptimizerConfig, config: PolicyConfig) -> None:
    """Chooses Megatron's hybrid optimiser, which keeps a share of the float32 weights and moments in pinned host memory and
    steps them there with torch's Adam.

    It reads gradients where the precision-aware optimiser puts them; all types stay float32. Set here and not given to
    the constructor, which asks for Transformer Engine's version first and for its need of it later.
    """
    settings.optimizer_cpu_offload = True
    settings.optimizer_offload_fraction = config.optimizer_offload
    settings.overlap_cpu_optimizer_d2h_h2d = True
    settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False


def _check_offload(wrapped: Sequence[DistributedDataParallel], config: PolicyConfig) -> None:
    key = f"policy.optimizer_offload={config.optimizer_offload}"
    if not next(wrapped[0].parameters()).is_cuda:
        raise ConfigError(f"{key} moves the optimiser from the GPU to the host; without a GPU it is there already: give 0")
    if DTYPES[config.precision] is torch.float32:
        # Megatron's hybrid optimiser copies only 16-bit weights to its float32 ones when they are loaded.
        raise ConfigError(f"{key} needs float32 master weights beside 16-bit ones; give policy.precision=bf16 or fp8, or 0")


def _set_hyperparameters(optimizer: MegatronOptimizer, config: PolicyConfig) -> None:
    """The recipe's numbers: Megatron leaves some to a scheduler that a constant rate does not need, and a loaded state
    brings those it was saved with."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any], config: PolicyConfig) -> None:
    """Takes over an optimiser state that was loaded through `sharded_state_dict`: moments, float32 weights and the count
    of steps. Learning rate and the like stay the recipe's, and so does what this layout chains and groups.

    With torch's Adam (no Transformer Engine, no Apex) Megatron-Core 0.16 cannot do it alone: it looks for a saved `step`
    of each parameter where it has left `step` out, and it gives all parameters one `step` tensor, which torch then
    advances once for each of them. So the moments are loaded while `step` is put aside, and every parameter gets its own.
    """
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    steps = _saved_steps(state)
    for index, part in enumerate(chain):
        if part.is_stub_optimizer:
            continue
        groups = part.state_dict()["optimizer"]["param_groups"]
        part.load_state_dict({"optimizer": {"param_groups": [{**group, **steps} for group in groups]}})
        alone = [part.optimizer] if _is_torchs(part.optimizer) else []
        put_aside = [(entry, entry.pop("step")) for inner in alone for entry in inner.state.values()]
        part.load_parameter_state_from_fully_reshardable((state if len(chain) == 1 else state[index])["param_state"])
        for entry, step in put_aside:
            entry["step"] = step
        for inner in filter(_is_torchs, _adams(part)):
            for entry in inner.state.values():
                entry["step"] = entry["step"].clone()
        _hand_steps_down(part)
    _set_hyperparameters(optimizer, config)


def _hand_steps_down(part: Any) -> None:
    """Takes the count of steps out of the hybrid optimiser's groups, with which it overwrites those of its parts before every
    step: a fused part would take the same step over and over."""
    if not hasattr(part.optimizer, "sub_optimizers"):
        return
    steps = {group.pop("step") for group in part.optimizer.param_groups if "step" in group}
    for inner in _adams(part):
        for group in inner.param_groups:
            group.pop("step", None)
            if steps and not _is_torchs(inner):
                group["step"] = max(steps)


def _saved_steps(state: dict[str, Any]) -> dict[str, Any]:
    """{"step": n} of a saved state, which may come from another chain than this layout's; {} if it never stepped."""
    saved = [entry["optimizer"] for entry in (state, *state.values()) if isinstance(entry, dict) and "optimizer" in entry]
    steps = {group["step"] for part in saved for group in part["param_groups"] if group.get("step") is not None}
    assert len(steps) <= 1, f"a saved optimiser state counts its steps as {steps}"
    return {"step": step for step in steps}


def _adams(part: Any) -> list[torch.optim.Optimizer]:
    """The optimisers that do a part's work: itself, or with `policy.optimizer_offload` one for each device."""
    return list(getattr(part.optimizer, "sub_optimizers", [part.optimizer]))


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Torch's own Adam, which counts each parameter's steps; a fused one counts its groups'."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _start_state(optimizer: MegatronOptimizer) -> None:
    """Gives every Adam its zero moments before the first step: Megatron cannot load into, or save, a state not there yet, nor
    can the host memory that the state sleeps in be taken once.

    The hybrid optimiser names its classes in its groups, which would be saved, and a file with classes is not loaded.
    """
    for part in parts_of(optimizer):
        for inner in _adams(part):
            own = _is_torchs(inner)
            for group in inner.param_groups:
                if own:
                    group["fused"], group["foreach"] = True, False  # one pass over memory instead of a dozen
                for parameter in group["params"]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    # The others count a group's steps, in the group.
                    steps = {"step": torch.zeros((), device=parameter.device)} if own else {}
                    inner.state[parameter] = steps | moments
        if hasattr(part.optimizer, "sub_optimizers"):
            part.optimizer._sync_sub_optimizers_state_to_hdo()
            for group in part.optimizer.param_groups:
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]

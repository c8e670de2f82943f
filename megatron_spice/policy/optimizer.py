"""Megatron's data-parallel wrapper and distributed optimiser around one stage."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_spice.config.schema import PolicyConfig
from megatron_spice.policy.model import DTYPES, PolicyModel

# Optimiser state is saved in a form that loads into any layout.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def wrap(model: PolicyModel) -> DistributedDataParallel:
    """Gradients in float32, reduced to the rank that owns their part of the optimiser."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
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
    for group in optimizer.param_groups:
        # Megatron leaves both to its learning-rate scheduler, which a constant rate does not need.
        group["lr"] = config.learning_rate
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return optimizer


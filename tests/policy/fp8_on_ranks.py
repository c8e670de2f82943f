"""What the FP8 tests do on ranks: one linear layer under tensor parallelism, and a whole policy with its audit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RECIPES = {"blockwise": ("blockwise", "e4m3"), "hybrid": ("blockwise", "hybrid"), "tensorwise": ("tensorwise", "e4m3")}


def run(jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Calls a function of this file for each job (its name, its arguments); one process start for all."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [globals()[name](**arguments) for name, arguments in jobs]


def policies(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`in_layouts` of on_ranks.py. In jobs that say "float32" an FP8 policy computes in float32 what is not FP8, so that
    another order of sums shows in few numbers, where bfloat16's would make many tip over to another FP8 one."""
    sys.path.insert(0, str(Path(__file__).parent))
    import on_ranks

    def each() -> Iterator[dict[str, Any]]:
        from megatron_spice.policy import precision

        for job in jobs:
            precision.DTYPES["fp8"] = torch.float32 if job.get("float32") else torch.bfloat16
            yield job

    return on_ranks.in_layouts(each())


def linear(
    kind: str, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, recipe: str | None, bias: Any = None,
    tensor: int = 1, sequence_parallel: bool = False, expert: bool = False, skip_bias_add: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The output and gradients of one layer, gathered to whole tensors: `weight` [n, k], `x` [t, 1, k], `dy` [t, 1, n];
    `recipe` is a key of RECIPES, None for bf16."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_spice.config.schema import Fp8Config
    from megatron_spice.policy.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear, Rounding

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(1)
    rank = parallel_state.get_tensor_model_parallel_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=8, tensor_model_parallel_size=tensor,
        sequence_parallel=sequence_parallel, params_dtype=weight.dtype, bf16=weight.dtype == torch.bfloat16,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    outputs, inputs = weight.shape
    common = {
        "config": config, "init_method": config.init_method, "bias": bias is not None, "skip_bias_add": skip_bias_add,
        "is_expert": expert,
    }  # fmt: skip
    column = kind == "column"
    if column:
        layer = Fp8ColumnParallelLinear(inputs, outputs, gather_output=False, **common)
    else:
        layer = Fp8RowParallelLinear(inputs, outputs, input_is_parallel=True, **common)
    if recipe:
        name, format = RECIPES[recipe]
        layer.rounding = Rounding.of(Fp8Config(recipe=name, format=format))

    def shard(whole: torch.Tensor, dim: int) -> torch.Tensor:
        return whole.chunk(tensor, dim)[rank].contiguous()

    def whole(part: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(tensor)]
        torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts, dim)

    layer.weight.data.copy_(shard(weight, 0 if column else 1))
    if bias is not None:
        layer.bias.data.copy_(shard(bias, 0) if column else bias)
    tokens = 0 if sequence_parallel and not expert else None  # experts get their tokens from the dispatcher
    split_x, split_y = (tokens, 2) if column else (2, tokens)
    mine = (x if split_x is None else shard(x, split_x)).clone().requires_grad_()
    output, output_bias = layer(mine)
    output.backward(dy if split_y is None else shard(dy, split_y))
    result = {
        "y": output.detach() if split_y is None else whole(output.detach(), split_y),
        "dx": mine.grad if split_x is None else whole(mine.grad, split_x),
        "dw": whole(layer.weight.grad, 0 if column else 1),
        "output_bias": output_bias is not None,
        "counts": (layer.forwards, layer.fp8_forwards),
    }
    if expert:
        torch.distributed.all_reduce(result["dx" if column else "y"])
    if bias is not None and layer.bias.grad is not None:
        result["dbias"] = whole(layer.bias.grad, 0) if column else layer.bias.grad
    parallel_state.destroy_model_parallel()
    return result


def policy(model: Path, settings: dict[str, Any], trajectories: list[Any]) -> dict[str, Any]:
    """An update's metrics, and the audit before and after it."""
    from megatron_spice.cluster import topology
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy import precision
    from megatron_spice.policy.policy import Policy

    config = Config.model_validate({
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"}, "rollout": {"bucket_mb": 1},
        "policy": {"model": model, "learning_rate": 1e-3, **settings},
        "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
    })  # fmt: skip
    policy = Policy(config, read_architecture(model), topology.from_environment("cpu"))
    try:
        policy.load_hf(model)
        before = precision.audit(policy.chunks, config.policy)
        metrics = policy.update(trajectories)
        precision.assert_recipe_reached(policy.chunks[0].config, policy.optimizer.config, config.policy, emulated=True)
        return {"before": before, "after": precision.audit(policy.chunks, config.policy), "metrics": metrics}
    finally:
        policy.close()


def settings(**policy: Any) -> dict[str, Any]:
    """What Megatron is told for a precision, with and without Transformer Engine, and what is asked of rows and machine."""
    from small_models import DENSE

    from megatron_spice.config.errors import ConfigError
    from megatron_spice.config.schema import PolicyConfig
    from megatron_spice.policy import precision

    config = PolicyConfig.model_validate({"model": "/nowhere", **policy})
    try:
        precision.check_available(config, DENSE, torch.device("cpu"))
        problem = ""
    except ConfigError as error:
        problem = str(error)
    return {
        "real": precision.transformer_settings(config, emulated=False),
        "emulated": precision.transformer_settings(config, emulated=True),
        "optimizer": precision.optimizer_settings(config),
        "tokens": (precision.token_multiple(config, uses_te=False), precision.token_multiple(config, uses_te=True)),
        "dtype": precision.DTYPES[config.precision],
        "problem": problem,
        "sizes": precision.fp8_size_problems(config, DENSE),
    }


def accepted_by_megatron(**settings: Any) -> str:
    """What Megatron says to settings of its TransformerConfig; nothing if it takes them."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=8, bf16=True, **settings)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def forgotten_recipe(**policy: Any) -> list[str]:
    """What `assert_recipe_reached` says when one of Megatron's two configs was not told."""
    from types import SimpleNamespace

    from megatron_spice.config.schema import PolicyConfig
    from megatron_spice.policy import precision

    config = PolicyConfig.model_validate({"model": "/nowhere", **policy})
    told = {"fp8": None, **precision.transformer_settings(config, emulated=False)}
    model, optimizer = SimpleNamespace(**told), SimpleNamespace(**precision.optimizer_settings(config))
    precision.assert_recipe_reached(model, optimizer, config, emulated=False)
    heard = []
    for wrong in ((SimpleNamespace(**told | {"fp8_recipe": "delayed"}), optimizer), (model, SimpleNamespace(fp8_recipe=None))):
        try:
            precision.assert_recipe_reached(*wrong, config, emulated=False)
        except AssertionError as error:
            heard.append(str(error))
    return heard


def engine_audit() -> list[Any]:
    """The audit of a layer whose linears keep FP8 state as Transformer Engine's do: one of three forwards ran in FP8."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_spice.config.schema import PolicyConfig
    from megatron_spice.policy import precision

    class EngineLinear(torch.nn.Linear):
        fp8, fp8_meta = False, {}

    layer = TransformerLayer.__new__(TransformerLayer)
    torch.nn.Module.__init__(layer)
    layer.layer_number, layer.config = 8, type("Config", (), {"num_layers": 12})
    layer.linear = EngineLinear(4, 4)
    chunk = torch.nn.Module()
    chunk.layers = torch.nn.ModuleList([layer])
    config = PolicyConfig(model=Path("/nowhere"), precision="fp8")
    precision.prepare_layers([chunk], config)
    for fp8 in (False, True, False):
        layer.linear.fp8 = fp8
        layer.linear(torch.zeros(2, 4))
    return precision.audit([chunk], config)

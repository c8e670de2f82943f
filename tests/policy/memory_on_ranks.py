"""What test_memory.py and test_optimizer.py do on ranks; one process start for many jobs."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def in_turn(jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Runs the functions of this file that the jobs name, each with a policy built from the job's settings."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [globals()[name](here, **job) for name, job in jobs]


def make_policy(here: Any, model: Path, **policy: Any) -> Any:
    """A policy with the weights of a Hugging Face folder."""
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.policy import Policy

    config = Config.model_validate({
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"},
        "policy": {"model": model, "precision": "fp32", "learning_rate": 1e-2, **policy},
        "rollout": {"bucket_mb": 1}, "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
    })  # fmt: skip
    made = Policy(config, read_architecture(model), here)
    made.load_hf(model)
    return made


def refusal(here: Any, model: Path, **policy: Any) -> str:
    """What a recipe is refused with."""
    from megatron_spice.config.errors import ConfigError
    from megatron_spice.policy import parallel

    try:
        make_policy(here, model, **policy)
    except ConfigError as error:
        return str(error)
    finally:
        parallel.shutdown()
    return "taken"


def contents(policy: Any) -> list[torch.Tensor]:
    """Copies of all that must survive sleep: weights, and everything the optimiser holds."""
    from megatron_spice.policy.memory import optimizer_tensors

    tensors = [buffer.param_data for chunk in policy.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return [tensor.detach().clone() for tensor in [*tensors, *optimizer_tensors(policy.optimizer)]]


def held(policy: Any) -> dict[str, int]:
    """Bytes of the storages under weights, gradients and optimiser state at this moment, each storage once."""
    from megatron_spice.policy.memory import optimizer_tensors

    buffers = [buffer for chunk in policy.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    weights = {id(b): b.param_data.untyped_storage().nbytes() for b in buffers}
    addresses = {b.param_data.untyped_storage().data_ptr() for b in buffers}
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in optimizer_tensors(policy.optimizer)}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        "state": sum(size for address, size in state.items() if address not in addresses),
    }


def saved(policy: Any) -> tuple[list[Any], dict[str, bytes], str]:
    """What would be saved now, number by number."""
    found = policy.holdings(with_optimizer=True)
    pieces = [(p.key, p.whole, p.offsets, p.sizes, p.tensor.clone().view(torch.uint8).numpy().tobytes()) for p in found.pieces]
    return pieces, found.objects, str(found.common)


def sleep_between_updates(here: Any, model: Path, trajectories: list[Any], sleeps: int, **policy: Any) -> dict[str, Any]:
    """Three updates, with sleep and wake after each if `sleeps`; what was held, and the weights in the end."""
    from policy_weights import hf_buckets

    made = make_policy(here, model, **policy)
    result: dict[str, Any] = {"held": [], "metrics": [], "same": [], "saved": [], "updates": []}
    probe = [7, 3, 150, 202, 9]
    for _ in range(3):
        result["updates"].append(made.update(trajectories))
        for _ in range(sleeps):
            before, awake, score, to_save = contents(made), held(made), made.score(probe), saved(made)
            metrics = made.sleep(keep_weights=True)
            kept = held(made)
            result["saved"].append(saved(made) == to_save)
            # Weights that were kept are whole: they can be scored with and sent.
            result["same"].append(made.score(probe) == score)
            metrics |= made.sleep_weights()
            result["held"].append((awake, kept, held(made)))
            result["saved"].append(saved(made) == to_save and held(made) == result["held"][-1][2])
            metrics |= made.wake()
            result["metrics"].append(metrics)
            after = contents(made)
            result["same"].append(len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after)))
            result["same"].append(held(made) == awake)
    result["weights"] = {name: t.float().numpy() for bucket in hf_buckets(made) for name, t in bucket.items()}
    made.close()
    return result


def use_while_asleep(here: Any, model: Path, trajectories: list[Any], **policy: Any) -> list[str]:
    """What a sleeping policy says to each thing it cannot do."""
    made = make_policy(here, model, sleep="all", **policy)
    made.sleep(keep_weights=False)
    said = []
    for attempt in (lambda: made.update(trajectories), lambda: made.score([1, 2]), lambda: list(made.rollout_buckets())):
        try:
            attempt()
        except AssertionError as error:
            said.append(str(error))
    made.wake()
    made.close()
    return said


def wait_for_room(here: Any, readings: list[int]) -> tuple[int, list[int], str]:
    """Has a sleeper of 100 bytes wait for them as on a device whose driver says `readings`, the last one it needed once more.
    Returns what was free then, readings that were not asked for, and what is said when there is never enough."""
    from megatron_spice.cluster import free_memory
    from megatron_spice.policy.memory import Sleeper

    sleeper = Sleeper([], None, torch.device("cpu"), "all")
    sleeper._weights.put([torch.zeros(20)])
    sleeper._state.put([torch.zeros(5)])
    sleeper.device = torch.device("cuda")
    said: list[int] = []

    def read() -> int:
        if not said or said[-1] < 100:
            said.append(readings.pop(0))
        return said[-1]

    free_memory.free_for_torch = read
    free = sleeper._wait_for_room()
    free_memory.free_for_torch, free_memory.TIMEOUT = lambda: 99, 0.03
    try:
        sleeper._wait_for_room()
    except free_memory.NotFree as error:
        return free, readings, str(error)
    return free, readings, ""


class HostAsDevice(torch.overrides.TorchFunctionMode):
    """Lets Megatron's hybrid optimiser run without a GPU: it tells its two halves apart by `is_cuda`. Here every tensor is
    on the GPU until it is pinned, and so is what is made from a pinned one. For the optimiser's methods only: attention asks
    for `is_cuda` too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func == torch.Tensor.is_cuda.__get__:
            return not hasattr(args[0], "pinned")
        if func is torch.Tensor.pin_memory:
            result = args[0].clone()
            result.pinned = True
            return result
        result = func(*args, **kwargs)
        if func in (torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.float) and hasattr(args[0], "pinned"):
            result.pinned = True
        return result


def offloaded(
    here: Any, model: Path, trajectories: list[Any], folder: Path | None = None, sleep: str = "auto", **policy: Any
) -> dict[str, Any]:
    """Two updates, a save, a load into a fresh policy, and one more update of it; with the optimiser offloaded or not."""
    from policy_weights import hf_buckets, save_tensors

    from megatron_spice.checkpoint.checkpointer import load_tensors

    made = make_offloaded(here, model, sleep=sleep, **policy)
    result = {"offloaded": _elements_on_host(made), "updates": [made.update(trajectories) for _ in range(2)]}
    made.sleep(keep_weights=False)
    made.wake()
    save_tensors(made, folder, with_optimizer=True)
    made.close()
    again = make_offloaded(here, model, sleep=sleep, **policy)
    with HostAsDevice():
        load_tensors(again, folder.parent, with_optimizer=True)
    result["updates"].append(again.update(trajectories))
    result["weights"] = {name: t.float().numpy() for bucket in hf_buckets(again) for name, t in bucket.items()}
    again.close()
    return result


def make_offloaded(here: Any, model: Path, **policy: Any) -> Any:
    with HostAsDevice():
        made = make_policy(here, model, precision="bf16", **policy)
    step = made.optimizer.step

    def step_as_on_a_device() -> Any:
        with HostAsDevice():
            return step()

    made.optimizer.step = step_as_on_a_device
    return made


def _elements_on_host(policy: Any) -> tuple[int, int]:
    """Elements stepped on the host, and all elements, of this rank's optimisers."""
    from megatron_spice.policy.optimizer import parts_of

    inners = [part.optimizer for part in parts_of(policy.optimizer)]
    on_host = sum(len(getattr(inner, "gpu_params_map_cpu_copy", ())) and sum(
        copy.numel() for copy in inner.gpu_params_map_cpu_copy.values()) for inner in inners)  # fmt: skip
    return on_host, sum(p.numel() for inner in inners for group in inner.param_groups for p in group["params"])


def recomputed(here: Any, model: Path, trajectories: list[Any], **policy: Any) -> dict[str, Any]:
    """One update: the weights after it, and how often each kind of module ran forward: those of a layer by their own name,
    `layer` a whole one, `expert` the first linear layer of an expert."""
    from policy_weights import hf_buckets

    made = make_policy(here, model, **policy)
    runs: dict[str, int] = {}
    kinds = {
        r"layers\.\d+": "layer", r"self_attention\.core_attention": "core_attention", r"mlp": "mlp", r"mlp\.router": "router",
        r"mlp\.experts\.local_experts\.\d+\.linear_fc1": "expert",
    }  # fmt: skip

    def count(kind: str) -> Any:
        return lambda *_: runs.update({kind: runs.get(kind, 0) + 1})

    for chunk in made.chunks:
        for name, module in chunk.named_modules():
            for pattern, kind in kinds.items():
                if re.fullmatch(rf".*\b{pattern}", name):
                    module.register_forward_hook(count(kind))
    result = {"update": made.update(trajectories), "runs": runs}
    result["weights"] = {name: t.float().numpy() for bucket in hf_buckets(made) for name, t in bucket.items()}
    made.close()
    return result


def optimizer_config(here: Any, model: Path, **policy: Any) -> dict[str, Any]:
    """What Megatron's optimiser and model were told, how the model's linear layers round, and what the optimiser's groups
    say."""
    from megatron_spice.policy.optimizer import parts_of

    made = make_policy(here, model, **policy)
    config, model_config = parts_of(made.optimizer)[0].config, made.chunks[0].config
    linears = [m for chunk in made.chunks for m in chunk.decoder.modules() if hasattr(m, "rounding")]
    result = {
        "fp8_recipe": config.fp8_recipe,
        "model": (model_config.fp8, model_config.fp8_recipe, model_config.bf16, str(model_config.params_dtype)),
        "roundings": {(layer.rounding.tensorwise, layer.rounding.gradients) for layer in linears},
        "types": (config.bf16, str(config.params_dtype)),
        "parts": len(parts_of(made.optimizer)),
        "groups": [
            ([parameter.numel() for parameter in group["params"]], group["weight_decay"], group["lr"])
            for group in made.optimizer.param_groups
        ],
    }
    made.close()
    return result


def fused_parts(here: Any) -> dict[str, Any]:
    """What is chosen here, and which layers are told to add to the gradient buffers."""
    from megatron_spice.policy import fused

    result = {"here": _choices(), "described": fused.describe("cpu", uses_te=False)}
    engine_layer, plain = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    engine_layer.fuse_wgrad_accumulation = False
    result["engine_layers"] = fused.fuse_engine_layers([torch.nn.Sequential(engine_layer, plain)])
    result["fused"] = engine_layer.fuse_wgrad_accumulation, hasattr(plain, "fuse_wgrad_accumulation")
    return result


def fused_choices_with_engine(folders: dict[str, Path]) -> dict[str, Any]:
    """`fused_choices` in a process in which Megatron finds Transformer Engine's optimisers, and nothing else of it, when it is
    imported (the preparation does that)."""
    from megatron_spice.cluster import platform

    name = "transformer_engine.pytorch.optimizers"
    optimizers = sys.modules[name] = ModuleType(name)
    for part in ("FusedAdam", "FusedSGD"):
        setattr(optimizers, part, type(part, (torch.optim.AdamW,), {"__module__": name}))
    platform.prepare("cpu")
    return fused_choices(None, folders)


def fused_choices(here: Any, folders: dict[str, Path]) -> dict[str, Any]:
    """What is chosen as one folder of stand-ins after the other comes before all other modules. Leaves them there."""
    found = {"nothing more": _choices()}
    for what, folder in folders.items():
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        for module in [module for module in sys.modules if module.split(".")[0] == "apex"]:
            del sys.modules[module]
        found[what] = _choices()
    return found


def _choices() -> dict[str, Any]:
    """Whose Adam Megatron builds, the class's module in both places where it keeps it, and whether weight gradients are fused
    on ("cpu", "cuda") without and with Transformer Engine."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_spice.policy import fused

    return {
        "adam": fused.choose_adam(),
        "classes": {optimizer.Adam.__module__, distrib_optimizer.Adam.__module__},
        "fusion": [fused.gradient_accumulation_fusion(device, te) for device in ("cpu", "cuda") for te in (False, True)],
        "described": [fused.describe(device, uses_te=te) for device in ("cpu", "cuda") for te in (False, True)],
    }

"""What test_fused_adam.py does on ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from memory_on_ranks import HostAsDevice, held, make_offloaded  # noqa: E402


class FusedAdam(torch.optim.Optimizer):
    """Keeps its books as Transformer Engine's and Apex's do, whose kernels need a GPU: moments are made in the first step where
    there are none, and each group counts its steps itself."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, **unused: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - first) / (1 - first ** group["step"])
                square = state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second) / (1 - second ** group["step"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def in_turn(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs `saved_and_loaded` for each job, in turn with torch's Adam and with the one above in the place of a fused one."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        return [saved_and_loaded(here, **job) for job in jobs]


def saved_and_loaded(
    here: Any, model: Path, trajectories: list[Any], folder: Path, fused: bool, updates: int, **policy: Any
) -> dict[str, Any]:
    """So many updates, a save, a load into a fresh policy, and two more updates of it."""
    from policy_weights import hf_buckets, save_tensors

    from megatron_spice.checkpoint.checkpointer import load_tensors

    _choose(fused)
    made = make_offloaded(here, model, **policy)
    result: dict[str, Any] = {"held": [held(made)["state"]], "updates": [made.update(trajectories) for _ in range(updates)]}
    result["held"].append(held(made)["state"])
    save_tensors(made, folder, with_optimizer=True)
    made.close()
    again = make_offloaded(here, model, **policy)
    with HostAsDevice():
        load_tensors(again, folder.parent, with_optimizer=True)
    result["updates"] += [again.update(trajectories) for _ in range(2)]
    result["steps"] = _steps(again)
    result["weights"] = {name: t.float().numpy() for bucket in hf_buckets(again) for name, t in bucket.items()}
    again.close()
    return result


def _choose(fused: bool) -> None:
    """Which Adam Megatron builds; it decides at import, by the packages that are there."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam if fused else torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = not fused
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = fused


def _steps(policy: Any) -> set[tuple[str, int]]:
    """How many steps each kind of Adam has counted: (class, steps)."""
    from megatron_spice.policy.optimizer import parts_of

    found = set()
    for part in parts_of(policy.optimizer):
        for inner in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):
            counts = [group.get("step") for group in inner.param_groups] if isinstance(inner, FusedAdam) else [
                state["step"] for state in inner.state.values()
            ]  # fmt: skip
            found |= {(type(inner).__name__, int(count)) for count in counts}
    return found

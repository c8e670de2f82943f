"""The warm-up's step: transformers' cross entropy, and AdamW's step on its gradient, in every layout of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_models import import_transformers, make_model, some_trajectories

STEPS = 3
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "data": {},
    "switches": {"importance_cap": 0.5, "entropy_bonus": 0.1, "dual_clip": 2.0, "kl_coefficient": 0.1},
}


def expected(model: Path, trajectories: list, learning_rate: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of the same steps with transformers and torch."""
    import_transformers()
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        total, count = torch.zeros(()), 0
        for each in trajectories:
            ids = torch.tensor([[*each.prompt_ids, *each.completion_ids]])
            labels = ids.clone()
            labels[:, : len(each.prompt_ids)] = -100
            total = total + net(input_ids=ids, labels=labels).loss * len(each.completion_ids)
            count += len(each.completion_ids)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in net.named_parameters()}


def test_the_loss_is_transformers_and_so_are_the_weights_after_three_steps(tmp_path):
    model = make_model(tmp_path / "llama", "llama", tied=False)
    trajectories = some_trajectories(groups=5, size=3)
    losses, weights = expected(model, trajectories, 1e-3)
    jobs = [
        {
            "model": str(model), "fit": trajectories, "fits": STEPS, "gather": True,
            "overrides": {"policy": {"learning_rate": 1e-3, "clip_grad": 0.0, **layout}, "rollout": {"bucket_mb": 1, "temperature": 0.7}},
        }
        for layout in LAYOUTS.values()
    ]  # fmt: skip
    for layout, result in zip(LAYOUTS, run_ranks(2, Path(__file__).parent / "on_ranks.py", "in_layouts", jobs)[0]):
        assert result["fit"] == pytest.approx(losses, rel=1e-4), layout
        for name, weight in weights.items():
            torch.testing.assert_close(torch.from_numpy(result["weights"][name]), weight, atol=1e-4, rtol=1e-4, msg=f"{layout} {name}")

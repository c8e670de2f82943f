"""Loss and gradient against TRL's GRPOTrainer (`loss_type="dr_grpo"`, beta 0): its own padding, advantages, log-probabilities,
importance weights and loss, on the same Hugging Face model and the same batch, in float32.

TRL is given the batch through its `rollout_func`; ours is a whole `Policy.update`. What TRL computes with a vLLM engine's
log-probabilities is switched on after its constructor, which would start one.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_models import add_tokenizer, import_transformers, make_model, some_trajectories

from megatron_spice.game.groups import advantages
from megatron_spice.game.records import Trajectory
from megatron_spice.policy.loss import LossSettings, row_loss
from megatron_spice.policy.packing import Block, split_steps
from megatron_spice.policy.rows import RowTensors, row_tensors

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
ON_RANKS = Path(__file__).with_name("on_ranks.py")
GROUP = 3
LENGTH = 16  # L_max: what on_ranks.py gives both roles
# Adam's first step is lr * g / (|g| + eps): with such an eps it is lr / eps * g, and the weights tell the gradient.
EPS, SCALE = 1e6, 1e3
LINEAR = {"adam_eps": EPS, "learning_rate": SCALE * EPS, "clip_grad": 1e9}
ADAM = {"adam_eps": 1e-3, "learning_rate": 1e-2, "clip_grad": 1e9}


def _batch(groups: int = 4) -> list[Trajectory]:
    """Trajectories with rewards and the advantages that the game gives them; the second group's are all equal. The engine's
    log-probabilities are about those of a model that knows nothing, on both sides."""
    rng = random.Random(1)
    found = [replace(t, logprobs=tuple(rng.uniform(-10, -4) for _ in t.logprobs)) for t in some_trajectories(groups, GROUP)]
    rewards = [0.5 if index // GROUP == 1 else float(index % GROUP > 0) + 0.25 * (index % 2) for index in range(len(found))]
    relative = [a for start in range(0, len(found), GROUP) for a in advantages(rewards[start : start + GROUP])]
    return [replace(t, reward=r, advantage=a) for t, r, a in zip(found, rewards, relative, strict=True)]


BATCH = _batch()


class Theirs:
    """TRL's trainer on a model folder, told the batch instead of sampling it."""

    def __init__(self, folder: Path, output: Path, engine: bool = False, **settings: Any) -> None:
        import trl
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        arguments = dict(
            output_dir=str(output), loss_type="dr_grpo", beta=0.0, scale_rewards="none", max_completion_length=LENGTH,
            num_generations=GROUP, per_device_train_batch_size=len(BATCH), gradient_accumulation_steps=1, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], vllm_importance_sampling_mode="token_truncate",
        )  # fmt: skip
        self.trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda prompts, **_: [BATCH[int(prompt)].reward for prompt in prompts],
            rollout_func=self._rollout,
            args=trl.GRPOConfig(**arguments | settings),
            train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(BATCH))]}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        self.trainer.use_vllm = engine
        self.trainer._last_loaded_step = 0
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model.train()

    @staticmethod
    def _rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        played = [BATCH[int(prompt)] for prompt in prompts]
        return {
            "prompt_ids": [list(t.prompt_ids) for t in played],
            "completion_ids": [list(t.completion_ids) for t in played],
            "logprobs": [list(t.logprobs) for t in played],
        }

    def inputs(self, trajectories: list[Trajectory]) -> dict[str, Any]:
        """What TRL makes of trajectories: padded tensors, advantages, log-probabilities before the step."""
        return self.trainer._generate_and_score_completions([{"prompt": str(BATCH.index(t))} for t in trajectories])

    def loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self.trainer.compute_loss(self.model, inputs)

    def logprobs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """TRL's log-probabilities and entropies of the batch's completion tokens, one trajectory after the other."""
        ids, masks = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        mask = inputs["completion_mask"].bool()
        logprobs, entropies, _ = self.trainer._get_per_token_logps_and_entropies(
            self.model, ids, masks, mask.shape[1], compute_entropy=True
        )
        return logprobs[mask], entropies[mask]

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import_transformers()
    pytest.importorskip("trl", reason="trl is not installed (bash install.sh --test; it needs Python 3.11)")
    found = {name: tmp_path_factory.mktemp("model") / "hf" for name in ("llama", "qwen3")}
    for name, folder in found.items():
        add_tokenizer(make_model(folder, name, tied=name == "llama"))
    return found


TOKENS = sum(len(t.completion_ids) for t in BATCH)
# name -> (family, our settings by room, TRL's settings, whether TRL has an engine's log-probabilities)
ONE_STEP: dict[str, tuple[str, dict, dict, bool]] = {
    "plain": ("llama", {}, {}, False),
    "another family, temperature": ("qwen3", {"rollout": {"temperature": 0.7}}, {"temperature": 0.7}, False),
    "unshared rows": ("llama", {"policy": {"shared_prefix": False, "tokens_per_microbatch": 24}}, {}, False),
    "truncated importance sampling": (
        "llama", {"policy": {"importance_cap": 2.0}}, {"vllm_importance_sampling_clip_max": 2.0}, True,
    ),
    # TRL's bonus is a mean over tokens, ours like the loss a sum over M L_max.
    "entropy bonus": (
        "qwen3", {"policy": {"entropy_bonus": 0.05}, "rollout": {"temperature": 1.3}},
        {"entropy_coef": 0.05 * TOKENS / (len(BATCH) * LENGTH), "temperature": 1.3}, False,
    ),
}  # fmt: skip
TWO_STEPS = {"clip_ratio": 0.1, "dual_clip": 1.3, "importance_cap": 2.0, "kl_coefficient": 0.2}


@pytest.fixture(scope="module")
def ours(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What `Policy.update` did, case by case."""
    cases = {name: (family, settings, LINEAR, 1) for name, (family, settings, _, _) in ONE_STEP.items()}
    cases["two steps"] = ("llama", {"policy": TWO_STEPS}, ADAM, 2)
    jobs = []
    for family, settings, adam, steps in cases.values():
        overrides = {**settings, "policy": {**settings.get("policy", {}), **adam}, "train": {"optimizer_steps": steps}}
        jobs.append({"model": models[family], "overrides": overrides, "trajectories": BATCH, "updates": 1, "gather": True})
    return dict(zip(cases, run_ranks(1, ON_RANKS, "in_layouts", jobs)[0], strict=True))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", ONE_STEP)
def test_one_step(ours, models, tmp_path, case):
    family, _, settings, engine = ONE_STEP[case]
    theirs = Theirs(models[family], tmp_path, engine, **settings)
    inputs = theirs.inputs(BATCH)
    assert (inputs["prompt_mask"][:, 0] == 0).any() and (inputs["completion_mask"][:, -1] == 0).any(), "nothing is padded"
    torch.testing.assert_close(inputs["advantages"], torch.tensor([t.advantage for t in BATCH]))
    before = {name: parameter.detach().clone() for name, parameter in theirs.model.named_parameters()}
    if engine:
        importance = inputs["importance_sampling_ratio"][inputs["completion_mask"].bool()]
        assert (importance == 2.0).any() and (importance < 2.0).any(), "one side of the cap is empty"
    loss = theirs.loss(inputs)
    loss.backward()
    gradients = theirs.gradients()
    metrics, weights = ours[case]["updates"][0], ours[case]["weights"]
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert weights.keys() == before.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert _difference((before[name] - torch.from_numpy(weights[name])) / SCALE, gradient) < 1e-4, name


def test_two_steps_of_one_rollout(ours, models, tmp_path):
    """The weights after both, with clipping, dual clip and truncated importance weights against the first log-probs, and a
    penalty for moving away from the weights before the first step, which only the second step feels."""
    theirs = Theirs(
        models["llama"], tmp_path, engine=True, epsilon=TWO_STEPS["clip_ratio"], delta=TWO_STEPS["dual_clip"],
        vllm_importance_sampling_clip_max=TWO_STEPS["importance_cap"], steps_per_generation=2,
        per_device_train_batch_size=len(BATCH) // 2, beta=TWO_STEPS["kl_coefficient"],
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in theirs.model.named_parameters()}
    optimizer = torch.optim.Adam(theirs.model.parameters(), ADAM["learning_rate"], betas=(0.9, 0.95), eps=ADAM["adam_eps"])
    losses = []
    for inputs in [theirs.inputs(part) for part in split_steps(BATCH, 2)]:
        if losses:
            mask = inputs["completion_mask"].bool()
            ratios = (theirs.logprobs(inputs)[0] - inputs["old_per_token_logps"][mask]).exp()
            pushed = (inputs["advantages"][:, None] < 0).expand_as(mask)[mask]
            assert (pushed & (ratios > TWO_STEPS["dual_clip"])).any(), "nothing for the dual clip to do"
        optimizer.zero_grad()
        losses.append(theirs.loss(inputs))
        losses[-1].backward()
        optimizer.step()
    metrics = ours["two steps"]["updates"][0]
    assert metrics["policy/clipped"] > 0 and theirs.trainer._metrics["train"]["clip_ratio/region_mean"][1] > 0
    assert metrics["policy/loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-4)
    assert metrics["policy/kl"] > 1e-3 and theirs.trainer._metrics["train"]["kl"][1] > 1e-3
    for name, parameter in theirs.model.named_parameters():
        moved = torch.from_numpy(ours["two steps"]["weights"][name]) - before[name]
        assert _difference(moved, parameter.detach() - before[name]) < 1e-4, name


@pytest.mark.parametrize("dual_clip, beta", [(None, 0.0), (1.5, 0.0), (None, 0.3)])
def test_given_old_log_probabilities(models, tmp_path, dual_clip, beta):
    """Ratios from 1/e to e: our loss of TRL's log-probabilities, and its gradient in the model, are TRL's."""
    theirs = Theirs(models["llama"], tmp_path, engine=True, delta=dual_clip, vllm_importance_sampling_clip_max=2.0, beta=beta)
    inputs = theirs.inputs(BATCH)
    mask = inputs["completion_mask"].bool()
    drift = 2 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) - 1
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + drift * mask
    importance = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).exp()
    inputs["importance_sampling_ratio"] = importance.clamp(max=2.0)
    if beta:
        inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + drift.flip(1) * mask
    loss = theirs.loss(inputs)
    loss.backward()
    expected = theirs.gradients()
    theirs.model.zero_grad()

    row = _flat_row(BATCH)
    row.old_logprobs_c = inputs["old_per_token_logps"][mask]
    row.reference_logprobs_c = inputs["ref_per_token_logps"][mask] if beta else None
    mine, tensors = row_loss(*theirs.logprobs(inputs), row, LossSettings(0.2, 2.0, dual_clip, kl_coefficient=beta))
    mine.backward()
    assert tensors["clipped"].any() and tensors["capped"].any() and tensors["dual_clipped"].any() == (dual_clip is not None)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in theirs.gradients().items():
        assert _difference(gradient, expected[name]) < 1e-4, name


def _flat_row(trajectories: list[Trajectory]) -> RowTensors:
    """A row of all the trajectories in their order, with their factor 1 / (M L_max)."""
    weight = 1 / (len(trajectories) * LENGTH)
    return row_tensors(tuple(Block(t.prompt_ids, (replace(t, weight=weight),)) for t in trajectories), "cpu")

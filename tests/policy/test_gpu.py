"""The policy on a GPU: FlexAttention, Transformer Engine, memory that sleeps, and weights by CUDA IPC."""

from __future__ import annotations

import base64
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_models import VOCAB, import_transformers, make_model, some_trajectories

from megatron_spice.policy.packing import plan_rows
from megatron_spice.policy.row_mask import dense_mask
from megatron_spice.policy.rows import row_tensors
from megatron_spice.rollout import bucket_loader
from megatron_spice.rollout.buckets import flatten

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = Path(__file__).with_name("on_gpu.py")
TRAJECTORIES = some_trajectories()
IDS = [(7 * index) % VOCAB for index in range(200)]
BF16, FP8 = {"precision": "bf16"}, {"precision": "fp8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sides that Transformer Engine's FP8 products take."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}
    return make_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", tied=True, **sizes)


@pytest.fixture(scope="module")
def learnt(model: Path) -> dict[str, dict[str, Any]]:
    common = {"model": model, "trajectories": TRAJECTORIES, "score": IDS, "updates": 2}
    jobs = {
        "bf16": {"policy": BF16, "sleeps": True}, "bf16 apart": {"policy": BF16 | {"shared_prefix": False}},
        "bf16 recomputed": {"policy": BF16 | {"recompute": "full"}},
    }  # fmt: skip
    if torch.cuda.get_device_capability() >= (9, 0):
        jobs |= {"fp8": {"policy": FP8, "sleeps": True}, "fp8 apart": {"policy": FP8 | {"shared_prefix": False}}}
    return dict(zip(jobs, run_ranks(1, ON_GPU, "learn", [common | job for job in jobs.values()])))


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found.double() - reference).norm() / reference.norm()).item()


def test_flex_attention_is_attention_for_rows_of_any_length():
    from megatron_spice.policy.flex import flex_attend

    torch.manual_seed(0)
    for groups, size in ((1, 2), (2, 3), (6, 5), (40, 8), (41, 8)):
        [[row]] = plan_rows(some_trajectories(groups, size), 10**6, 1, True)
        codes = row_tensors(row, "cuda", length=-(-sum(block.num_tokens for block in row) // 16) * 16).codes_k3
        query, key, value = (
            torch.randn(len(codes), heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
        )
        slope = torch.randn_like(query)
        flex_attend(query, key, value, codes, codes, 0.1).backward(slope)
        exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
        wide = [exact[0], *(tensor.repeat_interleave(4, 1) for tensor in exact[1:])]
        scores = 0.1 * torch.einsum("qnd,knd->nqk", wide[0], wide[1])
        scores = scores.masked_fill(~dense_mask(codes, codes), -torch.inf)
        torch.einsum("nqk,knd->qnd", scores.softmax(-1), wide[2]).backward(slope.double())
        for found, reference in zip((query, key, value), exact):
            assert relative(found.grad, reference.grad) < 1e-2


@pytest.mark.parametrize("with_entropy", [False, True])
def test_tiles_of_logits_give_the_gradients_of_the_whole(with_entropy):
    from megatron_spice.policy.logprobs import token_logprobs

    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16) * 0.3 for rows in (700, 3000))
    labels = torch.randint(0, 3000, (700,), device="cuda")
    slope, slope_of_entropy = torch.randn(2, 700, device="cuda", dtype=torch.float64)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    wanted = (exact[0] @ exact[1].t() / 0.8).log_softmax(-1)
    chosen, entropy = wanted.gather(1, labels[:, None])[:, 0], -(wanted.exp() * wanted).sum(-1)
    (chosen @ slope + (entropy @ slope_of_entropy if with_entropy else 0)).backward()
    ours = [tensor.requires_grad_() for tensor in (hidden, weight)]
    found, found_entropy = token_logprobs(*ours, labels, temperature=0.8, chunk=256, with_entropy_grad=with_entropy)
    (found @ slope.float() + (found_entropy @ slope_of_entropy.float() if with_entropy else 0)).backward()
    assert relative(found, chosen) < 1e-2 and relative(found_entropy, entropy) < 1e-2
    assert all(relative(mine.grad, theirs.grad) < 2e-2 for mine, theirs in zip(ours, exact))


def test_log_probabilities_are_transformers(model, learnt):
    import_transformers()
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    for name, result in learnt.items():
        mean = (torch.tensor(result["score"]) - expected).abs().mean()
        assert mean < (0.15 if "fp8" in name else 0.03), f"{name}: {mean}"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_prompts_computed_once_and_apart_are_the_same_update(learnt, precision):
    if precision not in learnt:
        pytest.skip("FP8 needs compute capability 9.0")
    shared, apart = learnt[precision]["updates"], learnt[f"{precision} apart"]["updates"]
    for one, other in zip(shared, apart):
        assert one["policy/grad_norm"] == pytest.approx(other["policy/grad_norm"], rel=0.02 if precision == "bf16" else 0.1)


def test_recomputed_activations_are_the_same_update(learnt):
    for one, other in zip(learnt["bf16"]["updates"], learnt["bf16 recomputed"]["updates"]):
        assert one["policy/grad_norm"] == pytest.approx(other["policy/grad_norm"], rel=0.01)


def test_the_linear_layers_ran_in_fp8(learnt):
    if "fp8" not in learnt:
        pytest.skip("FP8 needs compute capability 9.0")
    text = "\n".join(learnt["fp8"]["audit"])
    assert "blockwise e4m3" in text and "Transformer Engine" in learnt["fp8"]["describe"]


def test_what_slept_is_bit_for_bit_what_wakes(learnt):
    slept = [each for result in learnt.values() for each in result["slept"]]
    assert slept and all(each["same"] for each in slept)


def test_weights_reach_another_process_by_cuda_ipc():
    tensors = [("a", torch.arange(3, device="cuda", dtype=torch.bfloat16)), ("b", torch.randn(500, 200, device="cuda"))]
    bucket = flatten(tensors)
    again = flatten([(place.name, bucket.flat[place.start : place.end].view(place.dtype).view(place.shape)) for place in bucket.places])
    assert again.flat.data_ptr() == bucket.flat.data_ptr()  # what lies together is sent from where it is
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_received, (again.serialise(),))
    assert set(found) == {"a", "b"} and all(torch.equal(found[name], tensor.float().cpu()) for name, tensor in tensors)


def _received(text: str) -> dict[str, torch.Tensor]:
    class Model(torch.nn.Module):
        def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
            self.found = {name: tensor.float().cpu() for name, tensor in named}

    model = Model()
    bucket_loader.load(model, pickle.loads(base64.b64decode(text)))
    return model.found

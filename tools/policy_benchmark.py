"""One rank of `tools/benchmark.py policy`: builds the policy in a layout and precision, and times its updates.

Times are alternated in one process where two things are compared, because the machine may have other work: first theirs,
then ours, then theirs again. The gradient norms of their first updates say whether both computed the same.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Layer stacks by name: one of SmolLM2's size whose heads two ranks can share, SmolLM2 135M, Llama-3.2 1B and 3B, Llama-3.1 8B,
# Qwen3 0.6B and 8B; random weights.
STACKS = {
    "small": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8},
    "135m": {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9},
    "1b": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "3b": {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24},
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "qwen3-0.6b": {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
    "qwen3-8b": {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
}
THEIR_BATCHES = (4, 8, 16, 32)


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job on this rank (torchrun's variables are set); rank 0 writes the result as JSON."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare(job["device"]))
    import torch

    torch.set_num_threads(job["threads"])
    with distributed.process_group(here, 600):
        measured = _measure(job, here)
    if here.is_first:
        result.write_text(json.dumps(measured))


def _measure(job: dict[str, Any], here: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megatron_spice.config.hf import ModelArchitecture, read_architecture
    from megatron_spice.policy.flops import update_flops
    from megatron_spice.policy.packing import num_tokens, num_unshared_tokens, plan_rows
    from megatron_spice.policy.policy import Policy

    stack = job["model"] in STACKS
    if stack:
        architecture = ModelArchitecture.from_config(stack_config(job["model"], job["layers"]), job["model"])
    else:
        architecture = read_architecture(Path(job["model"]))
    trajectories = make_trajectories(job, architecture.vocab_size)
    policy = Policy(_config(job), architecture, here)
    if not stack:
        policy.load_hf(Path(job["model"]))

    contestants = {"ours": lambda: policy.update(trajectories)["policy/grad_norm"]}
    if job["against"] == "transformers":
        contestants["theirs"] = _fastest(job, trajectories)
    elif job["against"] == "unshared":
        unshared = _unshared(job, policy, architecture, here)
        contestants["theirs"] = lambda: unshared.update(trajectories)["policy/grad_norm"]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    norms: dict[str, float] = {}
    for name, step in contestants.items() if job["warm_up"] else ():
        norms[name] = step()  # allocations, compiled kernels
    for _ in range(job["steps"]):
        for name, step in reversed(contestants.items()):
            dist.barrier()
            took, norm = _timed(step, policy.device)
            seconds[name].append(took)
            norms.setdefault(name, norm)
    if job["profile"] and here.is_first:
        _profile(contestants["ours"], policy.device, Path(job["profile"]))
    elif job["profile"]:
        contestants["ours"]()
    [rows] = plan_rows(trajectories, job["row_tokens"], 1, job["shared"])
    computed = sum(map(num_tokens, rows))
    ours = statistics.median(seconds["ours"])
    ceiling = torch.tensor(_ceiling(architecture, policy.device, computed), dtype=torch.float64)
    dist.all_reduce(ceiling)
    peak = torch.tensor(_peak_gib(policy.device), dtype=torch.float64)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    flops = update_flops(architecture, rows)
    return {
        "layout": policy.layout.describe(), "precision": job["precision"], "seconds": seconds["ours"],
        "tokens": sum(map(num_unshared_tokens, rows)), "computed_tokens": computed, "rows": len(rows),
        "tokens_per_second": sum(map(num_unshared_tokens, rows)) / ours, "tflops": flops / ours / 1e12,
        "ceiling_tflops": ceiling.item(), "share_of_ceiling": flops / ours / 1e12 / ceiling.item(),
        "peak_gib": peak.item(), "their_seconds": seconds.get("theirs"), "first_gradient_norms": norms,
        "ratio": statistics.median(seconds["theirs"]) / ours if "theirs" in seconds else None,
    }  # fmt: skip


def make_trajectories(job: dict[str, Any], vocab_size: int) -> list[Any]:
    """Groups of equal prompts with random tokens, prompts of the job's lengths in turn; advantages sum to zero in each group
    and none is zero."""
    from megatron_spice.game.records import Trajectory

    rng = random.Random(job["seed"])
    found = []
    for group in range(job["groups"]):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(job["prompts"][group % len(job["prompts"])]))
        for member in range(job["group_size"]):
            completion = tuple(rng.randrange(vocab_size) for _ in range(job["completion"]))
            advantage = 1.0 if member % 2 else -1.0
            found.append(Trajectory("reasoner", prompt, completion, (-1.0,) * len(completion), advantage, reward=0.0))
    return found


def _config(job: dict[str, Any]) -> Any:
    from megatron_spice.config.schema import Config

    policy = {"precision": job["precision"], "shared_prefix": job["shared"], "tokens_per_microbatch": job["row_tokens"]}
    return Config.model_validate({
        "run": {"dir": "unused"}, "corpus": {"path": "unused"}, "cluster": {"device": job["device"]},
        "game": {"challenger_max_tokens": job["completion"], "reasoner_max_tokens": job["completion"]},
        "policy": {"model": job["model"], **policy, **job["settings"]},
    })  # fmt: skip


def stack_config(name: str, layers: int | None) -> dict[str, Any]:
    """Hugging Face's config.json of a stack, cut to so many layers."""
    shape = dict(STACKS[name], num_hidden_layers=layers or STACKS[name]["num_hidden_layers"])
    if name.startswith("qwen3"):
        return {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "tie_word_embeddings": name == "qwen3-0.6b", "max_position_embeddings": 40960,
            "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu", **shape,
        }  # fmt: skip
    small = name in ("small", "135m")
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 128 if name in ("3b", "8b") else 64,
        "num_key_value_heads": {"small": 4, "135m": 3}.get(name, 8),
        "vocab_size": 49152 if small else 128256, "tie_word_embeddings": small, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, **shape,
    }  # fmt: skip


def _timed(step: Callable[[], float], device: Any) -> tuple[float, float]:
    """Seconds it took, and what it returned."""
    import torch

    start = time.perf_counter()
    result = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _profile(step: Callable[[], float], device: Any, report: Path) -> None:
    """Runs one more update under torch's profiler and adds a table of the kernels that took longest to the report."""
    from torch.profiler import ProfilerActivity, profile

    on_device = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        _timed(step, device)
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("a", encoding="utf-8") as file:
        file.write(f"{table}\n")


def _unshared(job: dict[str, Any], policy: Any, architecture: Any, here: Any) -> Any:
    """The same policy, weights and all, which computes every prompt as often as it has completions."""
    import torch

    from megatron_spice.policy.policy import Policy

    other = Policy(_config(job | {"shared": False}), architecture, here)
    with torch.no_grad():
        for parameter, source in zip(other.parameters.values(), policy.parameters.values(), strict=True):
            parameter.copy_(source)
    other.optimizer.reload_model_params()
    return other


def _fastest(job: dict[str, Any], trajectories: Sequence[Any]) -> Callable[[], float]:
    """A plain update with transformers and torch's AdamW on the same tokens, at the batch size that is fastest here."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scale = 1.0 / (len(trajectories) * job["completion"])

    def step(batch: int) -> float:
        for start in range(0, len(trajectories), batch):
            part = trajectories[start : start + batch]
            ids = torch.tensor([t.prompt_ids + t.completion_ids for t in part])
            count = job["completion"]
            # Given its due: logits only where a completion token is predicted.
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, -count:, None])[..., 0]
            ratio = (logprobs - logprobs.detach()).exp()
            loss = -(ratio * torch.tensor([t.advantage for t in part])[:, None]).sum() * scale
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    batches = [batch for batch in THEIR_BATCHES if batch <= len(trajectories)] or [len(trajectories)]
    step(batches[0])
    times = {batch: _timed(lambda batch=batch: step(batch), torch.device("cpu"))[0] for batch in batches}
    best = min(times, key=times.__getitem__)
    return lambda: step(best)


def _ceiling(architecture: Any, device: Any, tokens: int) -> float:
    """TFLOP/s of the model's largest product, bfloat16, on this rank: the best of several, while the others do the same."""
    import torch

    rows = min(tokens, 4096)
    x = torch.randn(rows, architecture.hidden_size, device=device).bfloat16()
    weight = torch.randn(2 * architecture.ffn_hidden_size, architecture.hidden_size, device=device).bfloat16()
    best = min(_timed(lambda: (x @ weight.t())[0, 0].item(), device)[0] for _ in range(10))
    return 2.0 * x.numel() * weight.shape[0] / best / 1e12


def _peak_gib(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

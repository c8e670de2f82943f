"""`tools/benchmark.py sync`: a policy, a real engine, and the weights sent from one to the other many times.

Says how long that takes and what is left behind by it: growth is from the second sync to the last. The ceiling is a plain
copy of the same bytes between two processes: one writes them into memory that both have mapped, the other copies them out (on
an accelerator one process makes both copies). Copy and sync take turns, because the machine may have other work.

A stack with random weights is sent by what sends a policy's, without gradients and optimiser, so that a model fits whose
training would not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from benchmark_options import need_model_folder, positive
from policy_benchmark import STACKS, stack_config

from megatron_spice import machine

HELP = "the policy's weights on their way to an engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help=f"a Hugging Face folder, or random weights: {', '.join(STACKS)}")
    parser.add_argument("--layers", type=positive, help="so many layers of a stack with random weights")
    parser.add_argument("--server", type=json.loads, default={}, metavar="JSON", help="rollout.server")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--bucket-mb", type=positive, default=256, help="rollout.bucket_mb")
    parser.add_argument("--steps", type=positive, default=20, help="timed syncs; their median is reported")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One; ends with a message when there is no model."""
    if options.model not in STACKS:
        need_model_folder(options.model, f" and none of {', '.join(STACKS)}")
    return [{
        "title": options.precision, "ranks": 1, "device": machine.device("auto"), "model": options.model,
        "precision": options.precision, "steps": options.steps, "threads": options.threads or machine.usable_cores(),
        "layers": options.layers,
        "rollout": {"bucket_mb": options.bucket_mb, "max_total_tokens": 4096, "server": options.server},
    }]  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """What was sent, how fast, how fast a plain copy is, where the time went, and what a sync leaves behind."""
    lines = []
    for result in results:
        lines += [
            f"{result['precision']}: {result['gib']:.3f} GiB in {result['seconds']:.3f} s = "
            f"{result['gib_per_second']:.2f} GiB/s",
            f"plain copy between two processes: {result['copy_seconds']:.3f} s = {result['copy_gib_per_second']:.2f} GiB/s",
            f"sync / copy: {result['ratio']:.2f}",
            "seconds inside: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in result["parts"].items()),
            "growth: " + ", ".join(f"{name} {count:+.0f}" for name, count in result["growth"].items()),
        ]
    return "\n".join(lines)


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job in this process and writes the result as JSON."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare(job["device"]))
    import torch

    torch.set_num_threads(job["threads"])
    with distributed.process_group(here, 600):
        result.write_text(json.dumps(_measure(job, here)))


def _measure(job: dict[str, Any], here: Any) -> dict[str, Any]:
    from megatron_spice.config.schema import Config
    from megatron_spice.rollout.buckets import Parcel
    from megatron_spice.rollout.crew import Crew
    from megatron_spice.rollout.engine import WEIGHTS
    from megatron_spice.rollout.supervisor import SglangEngine
    from megatron_spice.weights import sync

    with tempfile.TemporaryDirectory() as folder:
        model, server = Path(job["model"]), dict(job["rollout"]["server"])
        if job["model"] in STACKS:
            model, server["skip_tokenizer_init"] = Path(folder) / "model", True
            model.mkdir()
            (model / "config.json").write_text(json.dumps(stack_config(job["model"], job["layers"])))
        config = Config.model_validate({
            "run": {"dir": "unused"}, "corpus": {"path": "unused"}, "cluster": {"device": job["device"]},
            "policy": {"model": str(model), "precision": job["precision"]},
            "rollout": {**job["rollout"], "server": server},
        })  # fmt: skip
        policy = (_Weights if job["model"] in STACKS else _policy)(config, here)
        engine = SglangEngine(config.rollout, here, config.policy.precision, model, Path(folder) / "engine.log")
        try:
            engine.launch()
            engine.wait_ready()
            parts, parcel = _Parts(engine), Parcel()
            crew = Crew([parts])
            counts: list[dict[str, float]] = []
            seconds: dict[str, list[float]] = {"sync": [], "copy": []}
            with _plain_copy(policy) as copy:
                copy()
                for version in range(job["steps"] + 1):
                    seconds["copy"].append(copy())
                    engine.sleep()  # as between two iterations
                    policy.sleep(keep_weights=True)
                    engine.wake([WEIGHTS])
                    memory = parcel if here.device == "cpu" else None
                    took, num_bytes = sync.push(
                        lambda: policy.rollout_buckets(memory), policy.rollout_names, crew, str(version)
                    )
                    policy.wake()
                    if crew.num_lost:
                        raise RuntimeError("; ".join(crew.last_words()))
                    seconds["sync"].append(took)
                    counts.append(_counts(engine.pid))
        finally:
            engine.close()
    ours, plain = (statistics.median(seconds[name][1:]) for name in ("sync", "copy"))  # the first maps and allocates
    gib = num_bytes / 2**30
    return {
        "layout": "engine on this machine", "precision": job["precision"], "gib": gib, "seconds": ours, "all_seconds": seconds,
        "gib_per_second": gib / ours, "copy_seconds": plain, "copy_gib_per_second": gib / plain, "ratio": ours / plain,
        "parts": {name: sum(times[len(times) // (job["steps"] + 1) :]) / job["steps"] for name, times in parts.seconds.items()},
        "growth": {name: counts[-1][name] - counts[1][name] for name in counts[0]},
    }  # fmt: skip


def _policy(config: Any, here: Any) -> Any:
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.policy.policy import Policy

    policy = Policy(config, read_architecture(config.policy.model), here)
    policy.load_hf(config.policy.model)
    return policy


class _Weights:
    """What of a policy a sync needs: its layers on the device, never trained, so that nothing else takes memory."""

    def __init__(self, config: Any, here: Any) -> None:
        import torch
        from megatron_spice.config.hf import read_architecture
        from megatron_spice.config.layout import ParallelLayout
        from megatron_spice.policy import parallel
        from megatron_spice.policy.model import build_chunks
        from megatron_spice.policy.model_config import Backend
        from megatron_spice.policy.precision import DTYPES
        from megatron_spice.weights.gather import Gatherer
        from megatron_spice.weights.stage import Stage, stage_parameters

        architecture = read_architecture(config.policy.model)
        self.device = torch.device("cpu" if here.device == "cpu" else f"cuda:{here.local_rank}")
        layout = ParallelLayout.of(config.policy, architecture, here.world_size)
        placement = parallel.initialize(layout, config.train.seed, config.cluster.timeout)
        self._chunks = build_chunks(
            architecture, config.policy, layout, placement, config.rollout.temperature, Backend.of(self.device)
        )
        for chunk in self._chunks:
            chunk.to(self.device).requires_grad_(False)
        elements = config.rollout.bucket_mb * 2**20 // DTYPES[config.policy.precision].itemsize
        self._gatherer = Gatherer(architecture, Stage(0, layout), elements)
        self._parameters = stage_parameters(self._chunks)
        self.rollout_names = {name for bucket in self._gatherer.plan for name in bucket.shapes}

    def rollout_buckets(self, memory: Any = None) -> Iterator[dict[str, Any]]:
        return self._gatherer.buckets(self._parameters, memory=memory)

    def sleep(self, keep_weights: bool) -> None:
        """There is nothing that could sleep."""

    def wake(self) -> None:
        """Nor anything to wake."""


class _Parts:
    """An engine whose verbs of an update are timed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds: dict[str, list[float]] = {"begin_update": [], "update_bucket": [], "end_update": []}

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._engine, name)
        if name not in self.seconds:
            return verb

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return verb(*arguments)
            finally:
                self.seconds[name].append(time.perf_counter() - start)

        return timed


@contextmanager
def _plain_copy(policy: Any) -> Iterator[Callable[[], float]]:
    """A function that copies the model's bytes to another process once and returns the seconds."""
    import torch
    import torch.multiprocessing as multiprocessing

    from megatron_spice.weights.sync import copy_rate

    if policy.device.type == "cuda":
        num_bytes = sum(tensor.nbytes for bucket in policy.rollout_buckets() for tensor in bucket.values())
        yield lambda: num_bytes / copy_rate(policy.device)
        return
    tensors = [tensor.clone() for bucket in policy.rollout_buckets() for tensor in bucket.values()]
    block = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype).share_memory_()
    places = block.split([tensor.numel() for tensor in tensors])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_receive, args=(there, block, torch.get_num_threads()), daemon=True)
    process.start()

    def copy() -> float:
        start = time.perf_counter()
        for tensor, place in zip(tensors, places):
            place.copy_(tensor.reshape(-1))
        here.send(True)
        here.recv()
        return time.perf_counter() - start

    try:
        yield copy
    finally:
        here.send(False)
        process.join(10)


def _receive(pipe: Any, block: Any, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    own = torch.empty_like(block)
    while pipe.recv():
        own.copy_(block)
        pipe.send(True)


def _counts(engine: int) -> dict[str, float]:
    """Memory and open files of this process and of the engine's, and what lies in shared memory."""
    served = [psutil.Process(engine), *psutil.Process(engine).children(recursive=True)]
    here = psutil.Process()
    return {
        "trainer_mib": here.memory_info().rss / 2**20,
        "engine_mib": sum(process.memory_info().rss for process in served) / 2**20,
        "trainer_files": here.num_fds(),
        "engine_files": sum(process.num_fds() for process in served),
        "shared_memory_files": len(os.listdir("/dev/shm")),
    }

"""`tools/benchmark.py sync`: a policy, a real engine, and the weights sent from one to the other many times.

Says how long that takes and what is left behind by it: growth is from the second sync to the last. The ceiling is a plain
copy of the same bytes between two processes: one writes them into shared memory that both have mapped, the other copies
them out. Copy and sync take turns, because the machine may have other work.
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

from megatron_spice import machine

HELP = "the policy's weights on their way to an engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--bucket-mb", type=positive, default=256, help="rollout.bucket_mb")
    parser.add_argument("--steps", type=positive, default=20, help="timed syncs; their median is reported")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One; ends with a message when there is no model."""
    need_model_folder(options.model)
    return [{
        "title": options.precision, "ranks": 1, "device": machine.device("auto"), "model": options.model,
        "precision": options.precision, "steps": options.steps, "threads": options.threads or machine.usable_cores(),
        "rollout": {"bucket_mb": options.bucket_mb, "max_total_tokens": 4096},
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
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.policy import Policy
    from megatron_spice.rollout.buckets import Parcel
    from megatron_spice.rollout.crew import Crew
    from megatron_spice.rollout.engine import WEIGHTS
    from megatron_spice.rollout.supervisor import SglangEngine
    from megatron_spice.weights import sync

    model = Path(job["model"])
    config = Config.model_validate({
        "run": {"dir": "unused"}, "corpus": {"path": "unused"}, "cluster": {"device": job["device"]},
        "policy": {"model": job["model"], "precision": job["precision"]}, "rollout": job["rollout"],
    })  # fmt: skip
    policy = Policy(config, read_architecture(model), here)
    policy.load_hf(model)
    with tempfile.TemporaryDirectory() as folder:
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
                    took, num_bytes = sync.push(
                        lambda: policy.rollout_buckets(parcel), policy.rollout_names, crew, str(version)
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

"""`tools/benchmark.py checkpoint`: saves of a real policy, weights and optimiser, as a run makes them, and loads of them.

    stall      what an iteration waits for: this rank's numbers are copied into host memory
    write      the rest, beside the run: the ranks' files, the index, fsync and the rename
    load       into the same layout, weights and optimiser
    beside     products of matrices by every rank while a checkpoint is written, against the same without: what a write costs
               those who compute meanwhile; they begin with it and take longer

Beside them are the ceilings: a plain copy in memory of the bytes that the stall copies, a plain write and fsync by every rank of
the bytes that it saves, and a plain read of the ranks' files; reads come from the page cache, as the loads do. All take turns
with what they are held against, because the machine may have other work. Times are the slowest rank's; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark_options import columns, need_model_folder, positive, several

from megatron_spice import machine

HELP = "a checkpoint's way to the disk and back"
GIB = 2**30
WORK_SECONDS = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--data", type=several, default=[1, 2], help="data-parallel ranks, a job each (default 1,2)")
    parser.add_argument("--steps", type=positive, default=7, help="rounds (default 7)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each number of ranks; ends with a message when there is no model."""
    need_model_folder(options.model)
    return [
        {
            "title": f"{options.precision}, DP={ranks}", "ranks": ranks, "device": machine.device("auto"), "model": options.model,
            "precision": options.precision, "steps": options.steps, "whole": True, "work_seconds": WORK_SECONDS, "folder": str(options.folder) if options.folder else None,
            "threads": options.threads or max(1, machine.usable_cores() // ranks),
        }
        for ranks in options.data
    ]  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each job and part: seconds, bytes a second, the ceiling, and how many times it the part took."""
    rows = [["job", "part", "GiB", "s", "GiB/s", "ceiling s", "ceiling GiB/s", "times the ceiling"]]
    for result in results:
        for part, found in result["parts"].items():
            ceiling = found.get("ceiling")
            beside = ["", "", ""] if ceiling is None else [
                f"{ceiling:.3f}", f"{result['gib'] / ceiling:.2f}", f"{found['seconds'] / ceiling:.2f}"
            ]  # fmt: skip
            rows.append([
                result["title"], part, f"{result['gib']:.3f}", f"{found['seconds']:.3f}", f"{result['gib'] / found['seconds']:.2f}",
                *beside,
            ])  # fmt: skip
    notes = [
        f"{result['title']}: {result['work_seconds']:.1f} s of products of matrices take {result['beside']:.3f} times as long beside a "
        f"write, whose thread uses {result['processor_seconds']:.2f} s of a processor on a rank; the first stall {result['first_stall']:.3f} s"
        for result in results
    ]
    return "\n".join([columns(rows), *notes])


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job on this rank; the first writes the result as JSON."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare(job["device"]))
    import torch

    torch.set_num_threads(job["threads"])
    with distributed.process_group(here, 600), tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        measured = _measure(job, here, _shared(Path(folder)))
    if here.is_first:
        result.write_text(json.dumps(measured))


def _shared(folder: Path) -> Path:
    """The first rank's folder, on every rank."""
    import torch.distributed as dist

    found = [folder]
    dist.broadcast_object_list(found, 0)
    return found[0]


def _measure(job: dict[str, Any], here: Any, folder: Path) -> dict[str, Any]:
    import torch

    from megatron_spice.checkpoint.checkpointer import Checkpointer, load_tensors
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import CheckpointConfig, Config
    from megatron_spice.policy.memory import optimizer_tensors
    from megatron_spice.policy.policy import Policy

    model = Path(job["model"])
    config = Config.model_validate({
        "run": {"dir": folder}, "corpus": {"path": "unused"}, "cluster": {"device": job["device"], "ranks_per_node": job["ranks"]},
        "policy": {"model": job["model"], "precision": job["precision"]},
    })  # fmt: skip
    policy = Policy(config, read_architecture(model), here)
    policy.load_hf(model)
    for tensor in optimizer_tensors(policy.optimizer):  # moments as of a policy that has learned: no pages of zeros
        if tensor.dim() and not tensor.any():
            tensor.normal_()
    checkpointer = Checkpointer(folder, CheckpointConfig(keep=1), model)
    checkpointer.reserve(policy)
    held = policy.holdings(with_optimizer=True)
    numbers = {piece.tensor.data_ptr(): piece.tensor for piece in held.pieces}
    mine = torch.cat([tensor.contiguous().view(torch.uint8).cpu() for tensor in numbers.values()])
    beside = torch.zeros_like(mine)
    raw = folder / f"raw_{here.rank}"
    parts: dict[str, list[float]] = {}
    work = _work(job.get("work_seconds", 1.0))

    def timed(name: str, act: Callable[[], Any]) -> Any:
        seconds, value = _slowest(act)
        parts.setdefault(name, []).append(seconds)
        return value

    for iteration in range(1, job["steps"] + 2):
        timed("plain copy in memory", lambda: beside.copy_(mine))
        timed("stall", lambda: checkpointer.begin(policy, {"iteration": iteration}))
        saved = timed("write", lambda: checkpointer.finish(wait=True))
        for name in ("begin", "file", "finish", "processor"):
            parts.setdefault(name, []).append(checkpointer.seconds[name])
        if not job["whole"]:  # saves alone, each when the disk is done with the one before, as after an iteration
            os.sync()
            time.sleep(1.0)
            continue
        timed("work alone", work)
        checkpointer.begin(policy, {"iteration": iteration})
        checkpointer.proceed()
        timed("work beside", work)
        checkpointer.finish(wait=True)
        timed("plain write and fsync", lambda: _write(raw, beside))
        timed("load", lambda: load_tensors(policy, saved, with_optimizer=True))
        timed("plain read", lambda: (saved / "weights" / f"__{here.rank}_0.distcp").read_bytes())
        raw.unlink()
    seconds = {name: statistics.median(times[1:]) for name, times in parts.items()}  # the first is a warm-up
    against = {"stall": "plain copy in memory", "write": "plain write and fsync", "load": "plain read"}
    total = torch.tensor(float(checkpointer.num_bytes))
    torch.distributed.all_reduce(total)
    gib = total.item() / GIB
    return {
        "title": job["title"], "layout": policy.layout.describe(), "gib": gib,
        "parts": {
            name: {"gib": gib, "seconds": seconds[name], **({"ceiling": seconds[against[name]]} if against.get(name) in seconds else {})}
            for name in ("stall", "write", "begin", "file", "finish", "load") if name in seconds
        },
        "processor_seconds": seconds["processor"], "work_seconds": seconds.get("work alone"),
        "beside": statistics.median(beside / alone for beside, alone in zip(parts["work beside"][1:], parts["work alone"][1:])) if job["whole"] else None,
        "first_stall": parts["stall"][0], "all_seconds": parts,
    }  # fmt: skip


def _work(seconds: float) -> Callable[[], None]:
    """Products of matrices that took about so long when this was called."""
    import torch

    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def work(count: int) -> None:
        for _ in range(count):
            left @ right

    work(100)
    start = time.perf_counter()
    work(200)
    count = max(1, int(200 * seconds / (time.perf_counter() - start)))
    return lambda: work(count)


def _slowest(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that all ranks together take, beginning at once, and what it gave here."""
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    value = act()
    dist.barrier()
    return time.perf_counter() - start, value


def _write(path: Path, numbers: Any) -> None:
    with open(path, "wb") as file:
        file.write(memoryview(numbers.numpy()))
        file.flush()
        os.fsync(file.fileno())

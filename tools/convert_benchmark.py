"""`tools/benchmark.py convert`: a random model of some gigabytes to Megatron and back, beside a plain copy of the same bytes.

The copy is `cp` of the folder and an fsync of each file, because a conversion too ends when its bytes are on the disk. A copy
goes before each conversion, because the machine may have other work; the median of each is reported. The start of the
tool (Python and torch) is told apart: it takes as long for a model of any size.

Memory is what the tool's processes have together that is nobody's file (proportional, from `/proc/PID/smaps_rollup`): pages of
mapped safetensors are the system's cache, which it takes back when it needs them. Looking at it slows a process down, so each
conversion is done twice, once for its time and once for its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from benchmark_options import columns, positive, refuse

from megatron_spice import machine

HELP = "a checkpoint on its way to Megatron and back"
TOOL = Path(__file__).with_name("convert_checkpoint.py")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 16, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
RANKS = ["--format", "mp_rank", "--tensor-parallel-size", "2"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--gigabytes", type=float, default=3, help="size of the model in bfloat16 (default 3)")
    parser.add_argument("--processes", type=positive, help="of the tool (default: all cores)")
    parser.add_argument("--rounds", type=positive, default=3, help="each converts in every way, with a copy before it (default 3)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where files are written and removed")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One; ends with a message when there is no room."""
    if not options.gigabytes > 0:
        refuse(f"--gigabytes {options.gigabytes} is no size")
    if shutil.disk_usage(options.scratch).free < 4 * options.gigabytes * 10**9:
        refuse(f"--scratch {options.scratch} has not the room for four times {options.gigabytes} GB")
    cores = machine.usable_cores()
    return [{
        "title": f"{options.gigabytes} GB", "ranks": 1, "gigabytes": options.gigabytes, "processes": options.processes or cores,
        "rounds": options.rounds, "scratch": str(options.scratch), "threads": options.threads or cores, "seed": options.seed,
    }]  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Seconds of each way, as multiples of the copy, and the memory it took."""
    lines = []
    for result in results:
        rows = [("", "s", "GB/s", "/ copy", "+ start s", "memory MB", "/ largest tensor", "/ largest file")]
        copy = statistics.median(result["seconds"]["copy"])
        rows.append(("copy and fsync", f"{copy:.2f}", f"{result['gigabytes'] / copy:.2f}", "1.00", "", "", "", ""))
        for way, seconds in result["seconds"].items():
            if way == "copy":
                continue
            took, start = statistics.median(seconds), statistics.median(result["start"][way])
            memory = statistics.median(result["memory"][way])
            rows.append((
                way, f"{took:.2f}", f"{result['gigabytes'] / took:.2f}", f"{took / copy:.2f}", f"{start:.2f}", f"{memory / 1e6:.0f}",
                f"{memory / result['largest_tensor']:.2f}", f"{memory / result['largest_file']:.2f}",
            ))  # fmt: skip
        lines += [f"{result['gigabytes']:.2f} GB, {result['processes']} processes, median of {result['rounds']} rounds", columns(rows)]
    return "\n".join(lines)


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job in this process and writes the result as JSON."""
    folder = Path(tempfile.mkdtemp(prefix="spice-convert-", dir=job["scratch"]))
    try:
        result.write_text(json.dumps(_measure(job, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    model, dist = folder / "hf", folder / "dist"
    num_bytes, largest = _make_model(model, job["gigabytes"], job["seed"])
    ways = {
        "hf-to-megatron": (["hf-to-megatron", model, dist], dist),
        "megatron-to-hf": (["megatron-to-hf", dist, folder / "back"], folder / "back"),
        "hf-to-megatron, mp_rank of TP=2": (["hf-to-megatron", model, folder / "ranks", *RANKS], folder / "ranks"),
        "megatron-to-hf, fp8": (["megatron-to-hf", dist, folder / "fp8", "--dtype", "fp8"], folder / "fp8"),
    }
    found: dict[str, dict[str, list[float]]] = {"seconds": {"copy": []}, "start": {}, "memory": {}}
    for _ in range(job["rounds"]):
        for way, (arguments, made) in ways.items():
            arguments = [*arguments, "--processes", job["processes"]]
            memory = _convert(arguments, watched=True)[2]
            shutil.rmtree(made)
            found["seconds"]["copy"].append(_copy(model, folder / "copy"))
            whole, inside, _ = _convert(arguments)
            for key, value in (("seconds", inside), ("start", whole - inside), ("memory", memory)):
                found[key].setdefault(way, []).append(value)
            if made != dist:
                shutil.rmtree(made)
        shutil.rmtree(dist)
    return {
        "layout": "one machine", "gigabytes": num_bytes / 1e9, "processes": job["processes"], "rounds": job["rounds"],
        "largest_tensor": largest,
        "largest_file": max(path.stat().st_size for path in model.glob("*.safetensors")), **found,
    }  # fmt: skip


def _make_model(folder: Path, gigabytes: float, seed: int) -> tuple[int, int]:
    """A random Llama; its bytes, and those of its largest tensor. Files of a gigabyte or so, as models come."""
    import torch
    from safetensors.torch import save_file

    from megatron_spice.config.hf import read_architecture
    from megatron_spice.weights.names import hf_shapes, table

    folder.mkdir(parents=True)
    width = 2048 if gigabytes >= 1 else 256
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 16 * width}
    of_a_layer = 2 * width * width * (3 * 4 + 2 + 2 / 4)
    layers = max(1, round((gigabytes * 10**9 - 2 * 2 * 16 * width * width) / of_a_layer))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **sizes, "num_hidden_layers": layers}))
    architecture = read_architecture(folder)
    shapes = {name: shape for entry in table(architecture) for name, shape in hf_shapes(entry, architecture).items()}
    noise = torch.randn(2**25, generator=torch.Generator().manual_seed(seed)).bfloat16()
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    total, count = sum(sizes.values()), max(1, round(gigabytes))
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    done = 0
    for number, (name, shape) in enumerate(shapes.items()):
        start = number * 4099 % 2**20
        numbers = math.prod(shape)
        part[name] = noise[start:].repeat(-(-numbers // (2**25 - start)))[:numbers].view(shape)
        done += sizes[name]
        if done >= total * (len(set(weight_map.values())) + 1) / count or number == len(shapes) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            part = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total, max(sizes.values())


def _copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, until it is on the disk."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    took = time.perf_counter() - start
    shutil.rmtree(target)
    return took


def _convert(arguments: Sequence[Any], watched: bool = False) -> tuple[float, float, float]:
    """Seconds of the whole command, of them those it says the conversion took, and the most memory its processes had (0 unless
    they are watched)."""
    os.sync()
    start = time.perf_counter()
    running = subprocess.Popen([sys.executable, TOOL, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with _peak_memory(running.pid, watched) as peak:
        said, complaint = running.communicate()
    whole = time.perf_counter() - start
    match = re.search(r"written in ([\d.]+) s", said)
    if running.returncode or match is None:
        raise RuntimeError(f"{' '.join(map(str, arguments))} ended with {running.returncode}: {complaint}")
    return whole, float(match[1]), max(peak)


@contextmanager
def _peak_memory(pid: int, watched: bool) -> Iterator[list[float]]:
    """What a process and its children have together, several times a second."""
    seen, over = [0.0], threading.Event()

    def watch() -> None:
        while watched and not over.wait(0.02):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                seen.append(sum(map(_anonymous, [pid, *(child.pid for child in process.children(recursive=True))])))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _anonymous(pid: int) -> float:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as rollup:
        return next((1024.0 * int(line.split()[1]) for line in rollup if line.startswith("Pss_Anon")), 0.0)
    return 0.0

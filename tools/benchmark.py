#!/usr/bin/env python3
"""Benchmarks of the parts of a run, each with its ceiling beside it.

    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --precision bf16,fp8
    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --unshared --against transformers
    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --against unshared --prompt 7500,200
    python tools/benchmark.py policy --model 8b --layers 4 --precision bf16,fp8 --layouts "tp=1"
    python tools/benchmark.py sync --model assets/smollm2-135m-instruct

`policy` times updates (forward, backward, optimiser) of groups of equal prompts, by layout and precision. A layout is a
list like `tp=2,pp=2`, several are separated by semicolons; keys: tp, pp, vp, cp, ep, sp (0 or 1), dp. Each runs in fresh
ranks on this machine, so that its peak memory is its own. Tokens are those of all sequences, each with its own prompt,
whether prompts are computed once or not; TFLOP/s counts only what is computed (policy/flops.py). The ceiling is a bfloat16
matrix product of the model's own shape, measured by the same ranks in the same run.

`sync` sends the policy's weights to an engine on this machine, many times, and says what was left behind by it: growth is
from the second sync to the last. The ceiling is a plain copy of the same bytes between two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import policy_benchmark  # noqa: E402
import sync_benchmark  # noqa: E402
from policy_benchmark import STACKS, temporary_result  # noqa: E402

from megatron_spice import machine  # noqa: E402
from megatron_spice.cluster.host_memory import TUNABLES  # noqa: E402

KEYS = {
    "tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "vp": "virtual_pipeline_size",
    "cp": "context_parallel_size", "ep": "expert_parallel_size", "sp": "sequence_parallel",
}  # fmt: skip
SUITES = {"policy": policy_benchmark, "sync": sync_benchmark}
VERSIONS = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a suite; returns 0, or 1 when a job failed (the others are reported)."""
    options = _parser().parse_args(arguments)
    if options.suite == "rank":
        job = json.loads(options.job)
        SUITES[job["suite"]].run_rank(job, options.result)
        return 0
    jobs = [{"suite": options.suite, **job} for job in (_jobs if options.suite == "policy" else _sync_jobs)(options)]
    results, failed = [], 0
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job['layout']} {job['precision']} ...", file=sys.stderr, flush=True)
        measured = _run(job)
        failed += measured is None
        results += [measured] if measured else []
    report = {
        "suite": options.suite, "command": shlex.join(["tools/benchmark.py", *(arguments or sys.argv[1:])]), "seed": options.seed,
        "date": time.strftime("%Y-%m-%d"), "machine": _machine(), "versions": {n: machine.version(n) for n in VERSIONS},
        "results": results,
    }  # fmt: skip
    text = (table if options.suite == "policy" else sync_table)(results)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / f"{options.name}.txt").write_text(text + "\n")
    print(f"{report['command']}\n{json.dumps(report['machine'])}\n{text}")
    return 1 if failed else 0


def parse_layout(text: str) -> tuple[int, dict[str, Any]]:
    """`tp=2,pp=2,dp=2` as the number of ranks and `policy` settings.

    Raises:
        ValueError: an unknown key or something that is no number.
    """
    degrees = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key not in (*KEYS, "dp") or not value.isdigit():
            raise ValueError(f"{part!r} in the layout {text!r}: give KEY=NUMBER with one of {', '.join((*KEYS, 'dp'))}")
        degrees[key] = int(value)
    ranks = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1) * degrees.get("dp", 1)
    settings = {KEYS[key]: bool(value) if key == "sp" else value for key, value in degrees.items() if key in KEYS}
    return ranks, settings


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for people, a line a job."""
    columns = [
        ("layout", "layout", "{}"), ("precision", "precision", "{}"), ("s/update", "median", "{:.2f}"),
        ("tokens/s", "tokens_per_second", "{:.0f}"), ("computed", "computed_share", "{:.0%}"), ("TFLOP/s", "tflops", "{:.3g}"),
        ("ceiling", "ceiling_tflops", "{:.3g}"), ("share", "share_of_ceiling", "{:.0%}"), ("peak GiB", "peak_gib", "{:.1f}"),
        ("theirs s", "theirs", "{:.2f}"), ("theirs/ours", "ratio", "{:.2f}"),
    ]  # fmt: skip
    rows = [[title for title, _, _ in columns]]
    for result in results:
        values = {
            **result, "median": statistics.median(result["seconds"]),
            "computed_share": result["computed_tokens"] / result["tokens"],
            "theirs": statistics.median(result["their_seconds"]) if result["their_seconds"] else None,
        }  # fmt: skip
        rows.append(["-" if values[key] is None else form.format(values[key]) for _, key, form in columns])
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    policy = suites.add_parser("policy", help="the policy's update, by layout and precision")
    policy.add_argument("--model", required=True, help=f"a Hugging Face folder, or random weights: {', '.join(STACKS)}")
    policy.add_argument("--layers", type=_positive, help="so many layers of a stack with random weights")
    policy.add_argument("--precision", default="bf16", help="fp32, bf16, fp8; several with commas (default bf16)")
    policy.add_argument("--layouts", default="tp=1", help="such as 'tp=1;pp=2;tp=2,cp=2' (default one rank)")
    policy.add_argument("--groups", type=_positive, default=4)
    policy.add_argument("--group-size", type=_positive, default=8)
    policy.add_argument(
        "--prompt", type=_several, default=[160], metavar="N[,N...]", help="tokens of a group's prompt; several: in turn"
    )
    policy.add_argument("--completion", type=_positive, default=32, help="tokens of each completion")
    policy.add_argument("--unshared", action="store_true", help="compute each prompt as often as it has completions")
    policy.add_argument("--row-tokens", type=_positive, default=3072, help="policy.tokens_per_microbatch")
    policy.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    policy.add_argument("--steps", type=_positive, default=3, help="timed updates; their median is reported")
    policy.add_argument("--threads", type=_positive, help="CPU threads of a rank (default: the cores shared out)")
    policy.add_argument("--seed", type=int, default=0)
    policy.add_argument(
        "--against", choices=["transformers", "unshared"],
        help="alternate with a plain transformers update (one rank), or with ours computing every prompt for every completion",
    )
    policy.add_argument("--no-warm-up", action="store_true", help="time the first updates too, where one takes minutes")
    policy.add_argument("--output", type=Path, help="folder for the results as JSON and text")
    policy.add_argument("--name", default="policy", help="name of the files in it")
    sync = suites.add_parser("sync", help="the policy's weights on their way to an engine")
    sync.add_argument("--model", required=True, help="a Hugging Face folder")
    sync.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp8"])
    sync.add_argument("--bucket-mb", type=_positive, default=256, help="rollout.bucket_mb")
    sync.add_argument("--steps", type=_positive, default=20, help="timed syncs; their median is reported")
    sync.add_argument("--threads", type=_positive, help="CPU threads of the policy (default: all cores)")
    sync.add_argument("--seed", type=int, default=0)
    sync.add_argument("--output", type=Path, help="folder for the results as JSON and text")
    sync.add_argument("--name", default="sync", help="name of the files in it")
    rank = suites.add_parser("rank", help=argparse.SUPPRESS)
    rank.add_argument("job")
    rank.add_argument("result", type=Path)
    return parser


def _sync_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not (Path(options.model) / "config.json").is_file():
        sys.exit(f"benchmark.py: --model {options.model} is no Hugging Face folder")
    return [{
        "layout": "sync", "ranks": 1, "device": machine.device("auto"), "model": options.model, "precision": options.precision,
        "steps": options.steps, "threads": options.threads or machine.usable_cores(),
        "rollout": {"bucket_mb": options.bucket_mb, "max_total_tokens": 4096},
    }]  # fmt: skip


def sync_table(results: Sequence[dict[str, Any]]) -> str:
    """What was sent, how fast, how fast a plain copy is, where the time went, and what a sync leaves behind."""
    lines = []
    for result in results:
        lines += [
            f"{result['precision']}: {result['gib']:.3f} GiB in {result['seconds']:.3f} s = {result['gib_per_second']:.2f} GiB/s",
            f"plain copy between two processes: {result['copy_seconds']:.3f} s = {result['copy_gib_per_second']:.2f} GiB/s",
            f"sync / copy: {result['ratio']:.2f}",
            "seconds inside: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in result["parts"].items()),
            "growth: " + ", ".join(f"{name} {count:+.0f}" for name, count in result["growth"].items()),
        ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _several(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each layout and precision; ends with exit code 2 where the options do not fit each other."""
    if options.model not in STACKS and not (Path(options.model) / "config.json").is_file():
        sys.exit(f"benchmark.py: --model {options.model} is no Hugging Face folder and none of {', '.join(STACKS)}")
    if options.against == "unshared" and options.unshared:
        sys.exit("benchmark.py: --against unshared compares with itself when --unshared is given: leave one of them out")
    if options.against == "transformers" and options.model in STACKS:
        sys.exit("benchmark.py: --against transformers needs a Hugging Face folder as --model")
    device, jobs = machine.device("auto"), []
    for layout in options.layouts.split(";"):
        try:
            ranks, settings = parse_layout(layout)
        except ValueError as error:
            sys.exit(f"benchmark.py: {error}")
        if options.against == "transformers" and ranks > 1:
            sys.exit(f"benchmark.py: --against transformers compares one rank, the layout {layout!r} has {ranks}")
        for precision in options.precision.split(","):
            if precision not in ("fp32", "bf16", "fp8"):
                sys.exit(f"benchmark.py: --precision {precision} is none of fp32, bf16, fp8")
            jobs.append({
                "layout": layout.strip(), "ranks": ranks, "settings": settings | {"recompute": options.recompute},
                "precision": precision, "device": device, "shared": not options.unshared, "row_tokens": options.row_tokens,
                "warm_up": not options.no_warm_up, "prompts": options.prompt,
                "threads": options.threads or max(1, machine.usable_cores() // ranks),
                **{key: getattr(options, key) for key in (
                    "model", "layers", "groups", "group_size", "completion", "steps", "seed", "against",
                )},
            })  # fmt: skip
    return jobs


def _run(job: dict[str, Any]) -> dict[str, Any] | None:
    """Runs a job's ranks and waits; None when one failed, whose last words are printed."""
    result = temporary_result()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(job["ranks"]):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "LOCAL_WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(job["threads"]),
            "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": TUNABLES, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, __file__, "rank", json.dumps(job), str(result)]
        log = open(result.with_name(f"rank{rank}.log"), "w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        rank = next(rank for rank, code in enumerate(codes) if code)
        print(f"rank {rank} failed:\n{result.with_name(f'rank{rank}.log').read_text()[-2000:]}", file=sys.stderr)
        return None
    return json.loads(result.read_text())


def _machine() -> dict[str, Any]:
    gpus = [gpu.name for gpu in machine.accelerators()]
    return {**machine.processor(), "memory_gib": round(machine.memory_gib() or 0), "accelerators": gpus or "none"}


if __name__ == "__main__":
    sys.exit(main())

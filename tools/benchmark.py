#!/usr/bin/env python3
"""Benchmarks of a run and of its parts, each with its ceiling or its rival beside it.

    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --precision bf16,fp8
    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --unshared --against transformers
    python tools/benchmark.py policy --model assets/smollm2-135m-instruct --against unshared --prompt 7500,200
    python tools/benchmark.py policy --model 8b --layers 4 --precision bf16,fp8 --layouts "tp=1"
    python tools/benchmark.py sync --model assets/smollm2-135m-instruct
    python tools/benchmark.py rollout --model assets/smollm2-135m-instruct
    python tools/benchmark.py iteration --model assets/smollm2-135m-instruct --against trl
    python tools/benchmark.py preprocess --tokenizer assets/smollm2-135m-instruct --megatron-lm ../Megatron-LM
    python tools/benchmark.py passages
    python tools/benchmark.py convert --gigabytes 3
    python tools/benchmark.py checkpoint --model assets/smollm2-135m-instruct
    python tools/benchmark.py calibrate --model assets/smollm2-135m-instruct
    python tools/benchmark.py scaling --ranks 1,2,4,8,16,32
    python tools/benchmark.py compare runs/before/benchmark.json runs/after/benchmark.json

`policy` times updates, by layout and precision; `sync` sends the policy's weights to an engine many times; `rollout` has
engines play uneven passages and says how long they had nothing to do; `iteration` times whole iterations of a recipe;
`preprocess` makes shards of texts; `passages` reads random passages from a corpus; `convert` converts a checkpoint beside a
plain copy of it; `checkpoint` saves and loads a policy; `scaling` runs many ranks whose compute is simulated. What each measures
and how is told by `benchmark.py SUITE --help`. A suite is a module here with HELP,
`add_arguments`, `jobs`, `run_rank` and `table`; its jobs run one after the other, each in ranks of its own
(benchmark_ranks.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import benchmark_ranks  # noqa: E402
import calibrate_benchmark  # noqa: E402
import checkpoint_benchmark  # noqa: E402
import convert_benchmark  # noqa: E402
import iteration_benchmark  # noqa: E402
import node_report  # noqa: E402
import passages_benchmark  # noqa: E402
import policy_suite  # noqa: E402
import preprocess_benchmark  # noqa: E402
import rollout_benchmark  # noqa: E402
import scaling_benchmark  # noqa: E402
import sync_benchmark  # noqa: E402
from benchmark_options import positive  # noqa: E402

from megatron_spice import machine  # noqa: E402
from megatron_spice.cluster.children import die_with_parent  # noqa: E402

SUITES: dict[str, Any] = {
    "policy": policy_suite, "sync": sync_benchmark, "rollout": rollout_benchmark, "iteration": iteration_benchmark,
    "preprocess": preprocess_benchmark, "passages": passages_benchmark, "convert": convert_benchmark,
    "checkpoint": checkpoint_benchmark,
    "scaling": scaling_benchmark,
    "calibrate": calibrate_benchmark,
}  # fmt: skip
VERSIONS = ("torch", "megatron-core", "sglang", "transformers", "trl", "transformer-engine", "numpy", "tokenizers", "gigatoken")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a suite; returns 0, or 1 when a job failed (the others are reported)."""
    options = _parser().parse_args(arguments)
    if options.suite == "compare":
        print(node_report.comparison(*map(node_report.read_report, (options.first, options.second))))
        return 0
    # Asked to end, it ends what it has started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.suite == "rank":
        die_with_parent()
        job = json.loads(Path(options.job[1:]).read_text() if options.job.startswith("@") else options.job)
        SUITES[job["suite"]].run_rank(job, options.result)
        return 0
    suite = SUITES[options.suite]
    jobs = [{"suite": options.suite, "time_limit": options.time_limit, **job} for job in suite.jobs(options)]
    results, failed = [], 0
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job['title']} ...", file=sys.stderr, flush=True)
        measured = benchmark_ranks.run(job)
        failed += measured is None
        results += [measured] if measured else []
    command = shlex.join(["tools/benchmark.py", *(arguments or sys.argv[1:])])
    report = {
        "suite": options.suite, "command": command, "seed": options.seed, "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(), "versions": {n: machine.version(n) for n in VERSIONS}, "results": results,
    }  # fmt: skip
    name = options.name or options.suite
    if options.output:  # what was measured first: a table may fail
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = suite.table(results)
    if options.output:
        (options.output / f"{name}.txt").write_text(text + "\n")
        if results and hasattr(suite, "finish"):
            suite.finish(results, options.output, name)
    print(f"{report['command']}\n{json.dumps(report['machine'])}\n{text}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        plain = argparse.RawDescriptionHelpFormatter
        command = suites.add_parser(name, help=suite.HELP, description=suite.__doc__, formatter_class=plain)
        suite.add_arguments(command)
        command.add_argument("--threads", type=positive, help="CPU threads of a rank (default: the cores shared out)")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--time-limit", type=positive, default=3600, help="seconds a job may take (default 3600)")
        command.add_argument("--output", type=Path, help="folder for the results as JSON and text")
        command.add_argument("--name", help="name of the files in it (default: the suite's)")
    compare = suites.add_parser("compare", help="two results of slurm/benchmark.sh: ratios with noise bounds")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    rank = suites.add_parser("rank", help=argparse.SUPPRESS)
    rank.add_argument("job")
    rank.add_argument("result", type=Path)
    return parser


def _machine() -> dict[str, Any]:
    gpus = [gpu.name for gpu in machine.accelerators()]
    return {**machine.processor(), "memory_gib": round(machine.memory_gib() or 0), "accelerators": gpus or "none"}


if __name__ == "__main__":
    sys.exit(main())

"""`tools/benchmark.py scaling`: weak scaling of a run on virtual nodes, so that few cores show what the framework itself costs.

Each of `--ranks` is measured with as many processes, one to a virtual node, each with an engine of its own and `--passages`
passages an iteration: the work of a rank is the same whatever their number. Efficiency is T(1) / T(N), where T is the median
of whole iterations and a tenth of what one that follows a checkpoint spends on it (`checkpoint.every` is 10 by default). What is real and what is not:

    real        every rank a process of its own; the driver (train.py) with its hand-overs, barriers and timers; the corpus and its
                sampler; the game with prompts, parsing and verification; the pool's claims through the store and its exchange of
                episodes; HTTP to one server a rank; Megatron's model, data-parallel buffers, distributed optimiser and
                torch_dist checkpoints of a tiny model over gloo; gathering the weights and putting them into shared memory;
                logs and metrics
    simulated   decoding: servers wait as long as it would take, with long-tailed lengths, the same for every group of samples
                or (`--tails`) drawn from `--seed` (simulated_engine.py); loading weights and handing memory over: servers wait; forward and backward: each rank
                waits as long as its rows' tokens take, and computes its shortest row for real, so that gradients flow

On few cores many ranks also wait for each other's turn on a core, which ranks of a cluster do not. So the simulated work has to
be long beside what all ranks compute together; with the defaults it is a fraction of what an iteration takes on GPUs.
`expected` is what the same iteration takes by its waits alone, tails of long completions included; what is more is overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_options import columns, positive, several
from scaling_ranks import run_rank

__all__ = ["HELP", "add_arguments", "jobs", "run_rank", "table"]
HELP = "weak scaling on virtual nodes with simulated compute"
PACE = {
    "per_token": 0.06, "prefill": 0.1, "update": 0.3, "hand_over": 0.1, "challenger_tokens": 24.0, "reasoner_tokens": 6.0,
    "spread": 0.7,
}  # fmt: skip
TRAIN_SECONDS_PER_TOKEN = 0.0015
PROCESSOR_SECONDS = 0.3
"""Of a rank and iteration, as measured with 1 to 8 ranks. The prediction is an iteration's waits and this of all ranks, shared out
over the cores: as if none of it went on while others wait."""
SAVE_EVERY = 10  # iterations, as `checkpoint.every` is by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--ranks", type=several, default=[1, 2, 4, 8, 16, 32], metavar="N[,N...]", help="default 1,2,4,8,16,32")
    parser.add_argument("--passages", type=positive, default=8, help="passages of a rank and iteration (default 8)")
    parser.add_argument("--iterations", type=positive, default=3, help="timed iterations, after one that is not and before one that saves (default 3)")
    parser.add_argument("--tails", action="store_true", help="draw lengths: with more ranks the longest completion is longer, and all wait for it")
    parser.add_argument("--pace", type=float, default=1.0, metavar="FACTOR", help="simulated seconds times this (default 1)")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each number of ranks."""
    factor = options.pace
    pace = {name: value * (factor if name in ("per_token", "prefill", "update", "hand_over") else 1) for name, value in PACE.items()}
    pace["tails"] = options.tails
    return [
        {
            "title": f"{count} ranks", "ranks": 1, "threads": 1, "virtual_ranks": count, "passages": options.passages, "in_flight": 4,
            "iterations": options.iterations, "seed": options.seed, "pace": pace, "train_per_token": TRAIN_SECONDS_PER_TOKEN * factor,
        }
        for count in options.ranks
    ]  # fmt: skip


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of ranks its median iteration, by phase too, beside what it takes by its waits alone; and efficiency."""
    rows: list[dict[str, Any]] = []
    for result in results:
        iterations = result["iterations"]
        phases = {name: statistics.median(each["seconds"].get(name, 0.0) for each in iterations) for name in result["phases"]}
        expected = {name: statistics.median(each["expected"][name] for each in iterations) for name in iterations[0]["expected"]}
        seconds = statistics.median(each["seconds"]["iteration"] for each in iterations) + result["saving"] / SAVE_EVERY
        simulated = statistics.median(sum(each["expected"].values()) for each in iterations)
        rows.append({
            "ranks": result["ranks"], "seconds": seconds, "phases": phases, "expected": expected, "expected_seconds": simulated,
            "saving": result["saving"], "overhead": {name: phases[name] - expected.get(name, 0.0) for name in phases},
            "predicted_seconds": simulated + PROCESSOR_SECONDS * result["ranks"] / result["cores"],
            "processor_seconds": statistics.median(each["processor"] for each in iterations),
        })  # fmt: skip
    first = rows[0]
    for row in rows:
        row["efficiency"] = first["seconds"] / row["seconds"]
        row["without_tails"] = row["expected_seconds"] / row["seconds"] / (first["expected_seconds"] / first["seconds"])
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each number of ranks: seconds, efficiency, and overhead by phase."""
    if not results:
        return "nothing was measured"
    names = results[0]["phases"]
    titles = ["ranks", "s/iteration", "by its waits", "predicted", "efficiency", "without tails", *(f"{name} s" for name in names), "a save s"]
    rows = [titles + [f"+{name}" for name in names] + ["CPU s/rank"]]
    for row in summary(results):
        rows.append([
            str(row["ranks"]), f"{row['seconds']:.2f}", f"{row['expected_seconds']:.2f}", f"{row['predicted_seconds']:.2f}", f"{row['efficiency']:.3f}",
            f"{row['without_tails']:.3f}", *(f"{row['phases'][name]:.2f}" for name in names), f"{row['saving']:.2f}",
            *(f"{row['overhead'][name]:.2f}" for name in names), f"{row['processor_seconds']:.2f}",
        ])  # fmt: skip
    return (
        columns(rows) + "\nefficiency: T(first) / T(N). without tails: the same, each iteration against its own waits. +phase: seconds "
        "beyond the waits"
    )


def finish(results: Sequence[dict[str, Any]], folder: Path, name: str) -> None:
    """Draws efficiency and seconds by phase over the number of ranks."""
    from benchmark_figures import scaling_figure

    rows = summary(results)
    scaling_figure(folder / f"{name}.png", [row["ranks"] for row in rows], [row["efficiency"] for row in rows], [row["phases"] for row in rows], "ranks")

#!/usr/bin/env python3
"""The two ends of slurm/benchmark.sh: what each of its runs has to override, and what they measured together.

Weak scaling: a run on N nodes (or ranks of one machine) has N times the recipe's passages. The first iteration is not counted.
Checkpoints are made as often as the recipe says, and after the last but one iteration at the latest: the next one has the seconds
that it waited for it, and those in which it was written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from benchmark_figures import scaling_figure  # noqa: E402
from benchmark_options import columns, several  # noqa: E402
from node_report import Count, Measurement, Report  # noqa: E402

from megatron_spice import machine  # noqa: E402
from megatron_spice.config.checks import check  # noqa: E402
from megatron_spice.config.describe import resolved  # noqa: E402
from megatron_spice.config.errors import EXIT_CODE, ConfigError  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.config.schema import Config  # noqa: E402

PHASES = ("sync", "play", "wake", "train", "save", "recover", "other")
VERSIONS = ("torch", "megatron-core", "sglang", "transformers", "transformer-engine", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 2 for a recipe that cannot be run."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ConfigError as error:
        print(f"benchmark.sh: {error}", file=sys.stderr)
        return EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in (("overrides", _overrides), ("collect", _collect)):
        command = commands.add_parser(name)
        command.add_argument("--unit", choices=["nodes", "ranks"], required=True)
        command.add_argument("--output", type=Path, required=True)
        if name == "overrides":
            command.add_argument("--count", type=int, required=True)
            command.add_argument("--iterations", type=int, required=True)
        else:
            command.add_argument("--counts", type=several, required=True)
        command.add_argument("recipe")
        command.add_argument("overrides", nargs="*")
        command.set_defaults(run=run)
    return parser


def _overrides(options: argparse.Namespace) -> int:
    """Prints what the run of one number overrides, the user's own first; checks the recipe so."""
    config = load_config(options.recipe, options.overrides)
    every = min(config.checkpoint.every, options.iterations)
    made = list(options.overrides)
    made += [
        f"run.dir={run_dir(options.output, options.unit, options.count)}", f"train.passages={config.train.passages * options.count}",
        f"train.iterations={options.iterations + 1}", f"checkpoint.every={every}", "checkpoint.resume=never",
    ]  # fmt: skip
    if options.unit == "ranks":
        made.append(f"cluster.ranks_per_node={options.count}")
    check(load_config(options.recipe, made), options.count if options.unit == "nodes" else 1)
    print("\n".join(made))
    return 0


def run_dir(output: Path, unit: str, count: int) -> Path:
    """The folder of the run with so many nodes or ranks."""
    return output.resolve() / f"{unit}-{count}"


def _collect(options: argparse.Namespace) -> int:
    """Writes benchmark.json and benchmark.png, and prints a table."""
    config = load_config(options.recipe, options.overrides)
    counts = [measured(options.output, options.unit, count, config) for count in options.counts]
    first = counts[0]
    for each in counts:
        each.efficiency = _seconds(first) / _seconds(each)
    gpus = [gpu.name for gpu in machine.accelerators()]
    report = Report(
        date=time.strftime("%Y-%m-%d"), command=shlex.join(["slurm/benchmark.sh", options.recipe, *options.overrides]),
        revision=machine.output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown", seed=config.train.seed, unit=options.unit,
        machine={**machine.processor(), "memory_gib": round(machine.memory_gib() or 0), "accelerators": gpus or "none"},
        versions={name: machine.version(name) for name in VERSIONS}, recipe=resolved(config), counts=counts,
    )  # fmt: skip
    (options.output / "benchmark.json").write_text(report.model_dump_json(indent=1) + "\n")
    scaling_figure(
        options.output / "benchmark.png", options.counts, [each.efficiency for each in counts], [each.phases for each in counts], options.unit
    )
    rows = [[options.unit, "ranks", "s/iteration", "efficiency", *(f"{name} s" for name in PHASES), "predicted s"]]
    for each in counts:
        phases = [f"{each.phases.get(name, 0.0):.2f}" for name in PHASES]
        rows.append([str(each.count), str(each.ranks), f"{_seconds(each):.2f}", f"{each.efficiency:.2f}", *phases, f"{sum(each.predicted.values()):.2f}"])
    print(f"{columns(rows)}\n{options.output / 'benchmark.json'}\n{options.output / 'benchmark.png'}")
    return 0


def _seconds(count: Count) -> float:
    return count.suites["iteration"]["seconds"].median


def measured(output: Path, unit: str, count: int, config: Config) -> Count:
    """What one run's log says of its timed iterations."""
    log = run_dir(output, unit, count) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][1:]
    ranks = count * config.cluster.ranks_per_node if unit == "nodes" else count
    phases = {name: statistics.median(line.get(f"seconds/{name}", 0.0) for line in lines) for name in PHASES}
    every = min(config.checkpoint.every, len(lines))
    return Count(
        count=count, ranks=ranks, passages=config.train.passages * count, suites=suites(lines, config.game.group_size, every), phases=phases,
        predicted=_predicted(config, unit, count), efficiency=1.0,
    )  # fmt: skip


def suites(lines: Sequence[dict[str, Any]], group: int, every: int) -> dict[str, dict[str, Measurement]]:
    """The five suites by what the run's metrics say; `group` answers were written to each task, each `every` iterations a checkpoint."""

    def series(name: str, unit: str, better: str = "less") -> Measurement:
        return Measurement(values=[line[name] for line in lines if line.get(name) is not None], unit=unit, better=better)

    generated = [
        line["challenger/attempts"] * line["challenger/length"] + line.get("reasoner/tasks", 0.0) * group * line.get("reasoner/length", 0.0)
        for line in lines
    ]  # fmt: skip
    rate = [tokens / line["seconds/play"] for tokens, line in zip(generated, lines)]
    trained = [line["policy/tokens"] / line["seconds/train"] for line in lines]
    waited = [line["seconds/save"] for line in lines if (line["iteration"] - 1) % every == 0]  # in the others for nothing
    return {
        "iteration": {
            "seconds": series("seconds/iteration", "s"), "tokens_per_second": series("tokens_per_second", "1/s", "more"),
            "other": series("seconds/other", "s"),
        },
        "policy": {"seconds": series("seconds/train", "s"), "computed_tokens_per_second": Measurement(values=trained, unit="1/s", better="more")},
        "rollout": {"seconds": series("seconds/play", "s"), "written_tokens_per_second": Measurement(values=rate, unit="1/s", better="more")},
        "sync": {
            "seconds": series("seconds/sync", "s"), "push_seconds": series("sync/push_seconds", "s"),
            "gib_per_second": series("sync/gib_per_second", "GiB/s", "more"), "times_a_copy": series("sync/times_a_copy", ""),
        },
        "checkpoint": {
            "waited_seconds": Measurement(values=waited, unit="s", better="less"), "write_seconds": series("save/write_seconds", "s"),
            "gib": series("save/gib", "GiB"),
        },
    }  # fmt: skip


def _predicted(config: Config, unit: str, count: int) -> dict[str, float]:
    """Seconds by phase by the cost model, for a run of this number."""
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.cost.device import default_file, read_device
    from megatron_spice.cost.estimate import estimate
    from megatron_spice.policy.memory_budget import H100_BYTES

    changed = config.model_copy(update={"train": config.train.model_copy(update={"passages": config.train.passages * count})})
    if unit == "ranks":
        changed = changed.model_copy(update={"cluster": config.cluster.model_copy(update={"ranks_per_node": count})})
    device = read_device(default_file(machine.device(config.cluster.device)))
    nodes, shape = count if unit == "nodes" else 1, read_architecture(config.policy.model)
    memory = min((gpu.memory_mib * 2**20 for gpu in machine.accelerators()), default=H100_BYTES)
    return estimate(changed, shape, nodes, device, machine.usable_cores(), memory=memory).phases


if __name__ == "__main__":
    sys.exit(main())

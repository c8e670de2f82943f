#!/usr/bin/env python3
"""The two ends of slurm/benchmark.sh: what each of its runs has to override, and what they measured together.

Weak scaling: a run on N nodes (or ranks of one machine) has N times the recipe's passages. The first iteration is not counted.
Checkpoints are made as often as the recipe says, and so often that three timed iterations follow one: these have the seconds that
they waited for it, and those in which it was written.

Runs of an earlier call with the same settings are taken as they are if they are complete, and else set aside and made anew.
"""

from __future__ import annotations

import argparse
import itertools
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
from node_report import FEWEST, Count, Measurement, Report  # noqa: E402

from megatron_spice import machine  # noqa: E402
from megatron_spice.checkpoint import ownership  # noqa: E402
from megatron_spice.config.checks import check  # noqa: E402
from megatron_spice.config.describe import resolved  # noqa: E402
from megatron_spice.config.errors import EXIT_CODE, ConfigError  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.config.schema import Config  # noqa: E402
from megatron_spice.telemetry.json_lines import read_json_lines  # noqa: E402
from megatron_spice.telemetry.run_log import METRICS_NAME  # noqa: E402

RECIPE_NAME = "recipe.yaml"
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
        command.add_argument("--iterations", type=int, required=True)
        if name == "overrides":
            command.add_argument("--count", type=int, required=True)
        else:
            command.add_argument("--counts", type=several, required=True)
        command.add_argument("recipe")
        command.add_argument("overrides", nargs="*")
        command.set_defaults(run=run)
    return parser


def _overrides(options: argparse.Namespace) -> int:
    """Prints what the run of one number overrides, the user's own first; checks the recipe so. Nothing for a run that is complete."""
    made = _made(options, options.count)
    config = load_config(options.recipe, made)
    if _is_complete(config):
        return 0
    if config.run.dir.exists():
        _set_aside(config)
    check(config, options.count if options.unit == "nodes" else 1)
    print("\n".join(made))
    return 0


def _made(options: argparse.Namespace, count: int) -> list[str]:
    config = load_config(options.recipe, options.overrides)
    every = min(config.checkpoint.every, max(1, options.iterations // FEWEST))
    made = [
        *options.overrides, f"run.dir={run_dir(options.output, options.unit, count)}", f"train.passages={config.train.passages * count}",
        f"train.iterations={options.iterations + 1}", f"checkpoint.every={every}", "checkpoint.resume=never",
    ]  # fmt: skip
    return made if options.unit == "nodes" else [*made, f"cluster.ranks_per_node={count}"]


def run_dir(output: Path, unit: str, count: int) -> Path:
    """The folder of the run with so many nodes or ranks."""
    return output.resolve() / f"{unit}-{count}"


def _is_complete(config: Config) -> bool:
    """Whether there is a run with these settings, and all of its iterations."""
    log = config.run.dir / METRICS_NAME
    return _recipe_of(config) == resolved(config) and log.is_file() and len(read_json_lines(log)) == config.train.iterations


def _recipe_of(config: Config) -> str | None:
    """The settings of the run that is in the folder already; None where it has not come so far."""
    path = config.run.dir / RECIPE_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _set_aside(config: Config) -> None:
    """Renames what a run has left that failed, so that another can begin in its place.

    Raises:
        ConfigError: it has other settings, or goes on still.
    """
    folder = config.run.dir
    if _recipe_of(config) not in (None, resolved(config)):
        raise ConfigError(
            f"{folder} is of an earlier call with other settings; give the same, name another --output, or remove it: "
            f"rm -r {shlex.quote(str(folder))}"
        )
    if (problem := ownership.in_use(folder)) is not None:
        raise ConfigError(problem)
    names = (folder.with_name(f"{folder.name}.unfinished-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    folder.rename(aside)
    print(f"benchmark.sh: {folder} was not finished; what there is of it is in {aside}", file=sys.stderr)


def _collect(options: argparse.Namespace) -> int:
    """Writes benchmark.json and benchmark.png of the runs that are complete, and prints a table; 1 if any is not."""
    runs = {count: load_config(options.recipe, _made(options, count)) for count in options.counts}
    missing = [count for count, run in runs.items() if not _is_complete(run)]
    if missing:
        print(
            f"benchmark.sh: not complete: {', '.join(map(str, missing))} {options.unit} (logs: {runs[missing[0]].run.dir}/logs); the same "
            f"call with --output {shlex.quote(str(options.output))} makes what is missing", file=sys.stderr,
        )  # fmt: skip
    if counts := [measured(options.unit, count, run) for count, run in runs.items() if count not in missing]:
        _write(options, counts)
    return 1 if missing else 0


def _write(options: argparse.Namespace, counts: Sequence[Count]) -> None:
    config = load_config(options.recipe, options.overrides)
    for each in counts:
        each.efficiency = _seconds(counts[0]) / _seconds(each)
    gpus = [gpu.name for gpu in machine.accelerators()]
    asked = [f"--{options.unit}-list", ",".join(map(str, options.counts)), "--iterations", str(options.iterations)]
    report = Report(
        date=time.strftime("%Y-%m-%d"), command=shlex.join(["slurm/benchmark.sh", *asked, options.recipe, *options.overrides]),
        revision=machine.output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown", seed=config.train.seed, unit=options.unit,
        machine={**machine.processor(), "memory_gib": round(machine.memory_gib() or 0), "accelerators": gpus or "none"},
        versions={name: machine.version(name) for name in VERSIONS}, recipe=resolved(config), counts=list(counts),
    )  # fmt: skip
    (options.output / "benchmark.json").write_text(report.model_dump_json(indent=1) + "\n")
    scaling_figure(
        options.output / "benchmark.png", [each.count for each in counts], [each.efficiency for each in counts],
        [each.phases for each in counts], options.unit,
    )  # fmt: skip
    rows = [[options.unit, "ranks", "s/iteration", "efficiency", *(f"{name} s" for name in PHASES), "predicted s"]]
    for each in counts:
        phases = [f"{each.phases.get(name, 0.0):.2f}" for name in PHASES]
        rows.append([str(each.count), str(each.ranks), f"{_seconds(each):.2f}", f"{each.efficiency:.2f}", *phases, f"{sum(each.predicted.values()):.2f}"])
    print(f"{columns(rows)}\n{options.output / 'benchmark.json'}\n{options.output / 'benchmark.png'}")


def _seconds(count: Count) -> float:
    return count.suites["iteration"]["seconds"].median


def measured(unit: str, count: int, config: Config) -> Count:
    """What the log of a run, which has these settings, says of its timed iterations."""
    lines = read_json_lines(config.run.dir / METRICS_NAME)[1:]
    nodes = count if unit == "nodes" else 1
    phases = {name: statistics.median(line.get(f"seconds/{name}", 0.0) for line in lines) for name in PHASES}
    return Count(
        count=count, ranks=nodes * config.cluster.ranks_per_node, passages=config.train.passages,
        suites=suites(lines, config.game.group_size, config.checkpoint.every), phases=phases, predicted=_predicted(config, nodes),
        efficiency=1.0,
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


def _predicted(config: Config, nodes: int) -> dict[str, float]:
    """Seconds by phase by the cost model, for a run with these settings."""
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.cost.device import default_file, read_device
    from megatron_spice.cost.estimate import estimate
    from megatron_spice.policy.memory_budget import H100_BYTES

    device = read_device(default_file(machine.device(config.cluster.device)))
    memory = min((gpu.memory_mib * 2**20 for gpu in machine.accelerators()), default=H100_BYTES)
    return estimate(config, read_architecture(config.policy.model), nodes, device, machine.usable_cores(), memory=memory).phases


if __name__ == "__main__":
    sys.exit(main())

"""What a recipe would start, said without starting it: settings, ranks and their places, engines, paths.

Where everything goes, what it takes of the devices' memory, and how long it is expected to take (cost/).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_spice import machine
from megatron_spice.cluster import host_memory
from megatron_spice.config.checks import check, check_layout, check_paths
from megatron_spice.config.describe import resolved
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import Config
from megatron_spice.cost import estimate
from megatron_spice.cost.device import default_file, read_device
from megatron_spice.policy import checkpoint_room, memory_budget, memory_verdict
from megatron_spice.policy.memory_budget import GIB, H100_BYTES, Device
from megatron_spice.rollout.placement import hosted_engine, remote_engines

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "spice.sh"
RANKS_SHOWN = 64
ASSUMED_HOST = 64 * GIB
PORT = 29500
"""Where nodes meet that are started by hand; torchrun's own default."""
INSTRUCTIONS = 1024
"""Tokens of a prompt besides its passage, at most; assumed, since counting them takes the tokenizer."""


def describe(config: Config, num_nodes: int, calibration: Path | None = None) -> tuple[str, list[str]]:
    """The plan as text, and what is in its way (empty when the recipe can run here).

    Args:
        calibration: the file with what work costs on the device; None: the one that comes with the package.
    """
    constants = read_device(calibration or default_file(machine.device(config.cluster.device)))
    problems: list[str] = []
    model, layout = "not readable", None
    try:
        check(config, num_nodes)
    except ConfigError as error:
        problems = error.problems
    try:
        shape = read_architecture(config.policy.model)
        model = _model(shape)
        layout = ParallelLayout.of(config.policy, shape, num_nodes * config.cluster.ranks_per_node)
    except ConfigError:
        pass  # among the problems already
    parts = [f"# Recipe, with every default filled in\n{resolved(config)}", f"# Model\n{model}\n", _paths(config)]
    if layout is not None:
        parts.append(_ranks(config, num_nodes, layout))
        text, too_much = memory(config, shape, layout)
        room, too_full = checkpoint_room.describe(config, shape, from_afar=True)
        parts += [text, room]
        problems = [*problems, *too_much, *([too_full] if too_full else [])]
        parts.append(estimate.table(config, shape, num_nodes, constants, machine.usable_cores(), _device(config).num_bytes))
    if not check_layout(config, num_nodes):
        parts.append(_engines(config, num_nodes))
    return "\n".join(parts), problems


def memory(config: Config, architecture: ModelArchitecture, layout: ParallelLayout) -> tuple[str, list[str]]:
    """What the recipe takes of this machine's devices as a table, and what is in its way."""
    made = memory_budget.budget(config, architecture, layout, _device(config), _longest_sequence(config))
    return memory_verdict.table(made, memory_verdict.warnings(made, config)), memory_verdict.problems(made, config)


def _device(config: Config) -> Device:
    """What parts are to fit in. Plans for GPUs are also made where there are none."""
    known = machine.memory_gib()
    host = None if known is None else int(known * GIB)
    if machine.device(config.cluster.device) == "cpu":
        shared = machine.shared_memory_gib()
        return Device(
            "cpu", host or ASSUMED_HOST, f"this machine's memory{'' if host else ' (not known; 64 GiB are assumed)'}",
            shared_memory=None if shared is None else int(shared * GIB),
        )  # fmt: skip
    found = machine.accelerators()
    if not found:
        return Device("cuda", H100_BYTES, "an H100 with 80 GB (assumed: this machine has no accelerator)")
    smallest = min(found, key=lambda accelerator: accelerator.memory_mib)
    return Device("cuda", smallest.memory_mib * 2**20, smallest.name, host_bytes=host)


def _longest_sequence(config: Config) -> int | None:
    """Tokens of the longest passage that the corpus may have, the instructions around it and a completion; None: unknown."""
    try:
        manifest = json.loads((config.corpus.path / "manifest.json").read_text(encoding="utf-8"))
        passage = int(manifest["options"]["max_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return passage + INSTRUCTIONS + max(config.game.challenger_max_tokens, config.game.reasoner_max_tokens)


def job(config: Config, num_nodes: int, arguments: Sequence[str], calibration: Path | None = None) -> str:
    """The command that starts the recipe (`arguments`: it and its overrides) on so many nodes, and what is asked of Slurm by it and
    by the script."""
    words = shlex.join(arguments)
    per_node = config.cluster.ranks_per_node
    accelerators = f" --gpus-per-node={per_node}" if machine.device(config.cluster.device) == "cuda" else ""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines() if SCRIPT.is_file() else []
    directives = [line for line in lines if line.startswith("#SBATCH") and not line.startswith("#SBATCH --nodes")]
    asked, told = _ending(config, num_nodes, calibration)
    if asked:
        directives = [f"#SBATCH{asked}" if line.startswith("#SBATCH --signal=") else line for line in directives]
    start = ["# Start", f"sbatch --nodes={num_nodes}{accelerators}{asked} slurm/spice.sh {words}", *directives, *_of_the_site(), *told]
    return "\n".join([*start, *_without_slurm(config, num_nodes, words), ""])


def _of_the_site() -> list[str]:
    """What sbatch takes from its environment, as far as it is seen here."""
    found = [f"{name}={shlex.quote(value)}" for name, value in sorted(os.environ.items()) if name.startswith("SBATCH_")]
    return [f"{' '.join(found)}    (slurm/site.sh's are to be in the environment that sbatch is called from)"] if found else []


def _without_slurm(config: Config, num_nodes: int, words: str) -> list[str]:
    """What a person starts by hand where there is no Slurm; with several nodes, what slurm/spice.sh does on each."""
    if num_nodes == 1:
        return ["# Start without Slurm", f"bash slurm/spice.sh {words}"]
    here = Path(sys.executable)
    python = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in _environment(config).items())
    return [
        "# Start without Slurm: on every node, in the repository's folder, with 0 for I on the first, 1 on the next, and so on; FIRST is",
        "# the first one's address. What slurm/site.sh would set is to be set before.",
        f"PET_NODE_RANK=I {settings} \\",
        f"  {python} -m megatron_spice.launch --nnodes={num_nodes} --nproc-per-node={config.cluster.ranks_per_node} \\",
        f"  --master-addr=FIRST --master-port={PORT} --module megatron_spice train {words}",
    ]


def _environment(config: Config) -> dict[str, str]:
    """What slurm/spice.sh sets for ranks, of what changes how they run; a test compares the two."""
    found = {"SPICE_RUN_DIR": str(config.run.dir), "TOKENIZERS_PARALLELISM": "false"}
    if machine.device(config.cluster.device) != "cpu":
        return found | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    threads = max(1, machine.usable_cores() // config.cluster.ranks_per_node)
    return found | {
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": host_memory.TUNABLES,
    }  # fmt: skip


def _ending(config: Config, num_nodes: int, calibration: Path | None) -> tuple[str, list[str]]:
    """What sbatch is asked for if the job wants to hear of its time limit earlier than the script asks by itself, and in words the
    shortest limit with which it gets on and how long Slurm must wait for it when it ends it before; nothing where the recipe cannot
    be judged."""
    constants = read_device(calibration or default_file(machine.device(config.cluster.device)))
    try:
        shape = read_architecture(config.policy.model)
        judged = (config, shape, num_nodes, constants, machine.usable_cores())
        warning, (playing, longest) = estimate.warning_seconds(*judged), estimate.ending_seconds(*judged)
        iteration = estimate.estimate(*judged, memory=_device(config).num_bytes).seconds
    except ConfigError:
        return "", []
    least = math.ceil((config.rollout.start_timeout + iteration + warning) / 60)
    told = [
        f"shortest sensible --time: {least} min, for one iteration a start (rollout.start_timeout {config.rollout.start_timeout:.0f} s, the "
        f"iteration {iteration:.1f} s, the warning {warning} s)",
        f"told to end before (scancel, scontrol requeue, a preemption), it is saved after about {math.ceil(playing)} s while it plays, "
        f"{math.ceil(longest)} s at most:",
        "Slurm's KillWait (`scontrol show config`; 30 s by default), and a GraceTime before it, should leave it that long",
    ]
    return f" --signal=B:USR1@{warning}" if warning > estimate.SHORTEST_WARNING else "", told


def launch_environment(config: Config) -> str:
    """What slurm/spice.sh needs to know, as shell assignments that `eval` can read.

    Raises:
        ConfigError: no checkpoint fits where the run is to write: better said here than by ranks that have been started for it.
    """
    _, too_full = checkpoint_room.describe(config, read_architecture(config.policy.model), from_afar=True)
    if too_full:
        raise ConfigError(too_full)
    values = {
        "SPICE_RANKS_PER_NODE": config.cluster.ranks_per_node,
        "SPICE_DEVICE_KIND": machine.device(config.cluster.device),
        "SPICE_RUN_DIR": config.run.dir,
        "SPICE_TUNABLES": host_memory.TUNABLES,
    }
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def _paths(config: Config) -> str:
    missing_corpus = any(problem.startswith("corpus.path") for problem in check_paths(config))
    rows = [
        ("policy.model", config.policy.model, "there" if config.policy.model.exists() else "missing"),
        ("corpus.path", config.corpus.path, "missing" if missing_corpus else "there"),
        ("run.dir", config.run.dir, "there: goes on if it holds a checkpoint" if config.run.dir.exists() else "will be made"),
    ]
    return "# Paths\n" + "".join(f"{name:<13} {path}  ({state})\n" for name, path, state in rows)


def _model(shape: ModelArchitecture) -> str:
    experts = f", {shape.num_experts} experts, {shape.experts_per_token} of them a token" if shape.num_experts else ""
    return (
        f"{shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"{shape.num_query_groups} key/value heads, vocabulary {shape.vocab_size}{experts}"
    )


def _ranks(config: Config, num_nodes: int, layout: ParallelLayout) -> str:
    """A line for each rank; where they are many, for each node."""
    per_node, ranks = config.cluster.ranks_per_node, layout.world_size
    title = (
        f"# Ranks: {ranks} = tensor {layout.tensor} x context {layout.context} x data {layout.data} x pipeline "
        f"{layout.pipeline}, {num_nodes} x {per_node}, on {machine.device(config.cluster.device)}: {layout.describe()}"
    )
    table = [_rank(config, layout, rank) for rank in range(ranks)]
    if ranks > RANKS_SHOWN:
        table = [_together(table[first : first + per_node]) for first in range(0, ranks, per_node)]
    rows = [list(table[0]), *([row[name] for name in row] for row in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    return "\n".join([title, *lines]) + "\n"


def _rank(config: Config, layout: ParallelLayout, rank: int) -> dict[str, str]:
    """Megatron numbers ranks with the tensor-parallel rank fastest, then context, then data, then the pipeline stage. The engine that a
    rank hosts is named as its log is, `engine_NODE_N.log`."""
    rest, tensor = divmod(rank, layout.tensor)
    rest, context = divmod(rest, layout.context)
    pipeline, data = divmod(rest, layout.data)
    node, local = divmod(rank, config.cluster.ranks_per_node)
    chunks = [layout.layers_of(chunk) for chunk in range(pipeline, len(layout.chunk_layers), layout.pipeline)]
    places = {
        "rank": rank, "node": node, "local": local, "tensor": tensor, "context": context, "data": data,
        "expert": rank % (layout.world_size // layout.pipeline) % layout.expert, "pipeline": pipeline,
    }  # fmt: skip
    return {
        **{name: str(place) for name, place in places.items()}, "engine": _engine_of(config, node, local),
        "layers": " ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks),
    }  # fmt: skip


def _engine_of(config: Config, node: int, local: int) -> str:
    per_node, engines = config.cluster.ranks_per_node, config.rollout.engines_per_node
    hosted = None if config.rollout.engines or engines > per_node else hosted_engine(local, per_node, engines)
    return "-" if hosted is None else f"{node}_{hosted}"


def _together(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """One row for those of a node: every value once, numbers that follow each other as first-last; engines with who hosts them."""
    told = {name: _spans(sorted({int(row[name]) for row in rows})) for name in rows[0] if name not in ("engine", "layers")}
    hosts = [f"{row['engine']} (rank {row['rank']})" for row in rows if row["engine"] != "-"]
    layers = dict.fromkeys(row["layers"] for row in rows)
    return told | {"engine": ", ".join(hosts) or "-", "layers": " | ".join(layers)}


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0-7` or `0,4-5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def _engines(config: Config, num_nodes: int) -> str:
    return _policys_engines(config, num_nodes) + _tasks_by(config)


def _tasks_by(config: Config) -> str:
    """Who writes the tasks, where the policy does not."""
    if not config.game.fixed_challenger:
        return ""
    urls = config.rollout.challenger.engines
    return f"tasks are written by {', '.join(urls) if urls else 'policy.model as it is, in one more engine beside each'}\n"


def _policys_engines(config: Config, num_nodes: int) -> str:
    passages = config.train.passages
    if urls := config.rollout.engines:
        ranks = num_nodes * config.cluster.ranks_per_node
        lines = [
            f"# Rollout engines: {len(urls)} that run already; they share {passages} passages an iteration, "
            f"{passages / len(urls):g} an engine on average"
        ]
        for rank in range(ranks):
            lines += [f"rank {rank} talks to {url}" for url in remote_engines(rank, ranks, urls)]
        if config.rollout.router is not None:
            lines.append(f"generations go through the router {config.rollout.router}, weights to each engine")
        return "\n".join(lines) + "\n"
    per_node, size = config.rollout.engines_per_node, config.rollout.tensor_parallel_size
    total = per_node * num_nodes
    return (
        f"# Rollout engines: {total} ({per_node} a node), {size} rank{'s' if size > 1 else ''} each; they share "
        f"{passages} passages an iteration, {passages / total:g} an engine on average; their logs are engine_NODE_N.log, and the column "
        "engine says NODE_N\n"
    )

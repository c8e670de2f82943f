"""What a recipe would start, said without starting it: settings, ranks and their places, engines, paths.

Where everything goes, what it takes of the devices' memory, and how long it is expected to take (cost/).
"""

from __future__ import annotations

import json
import math
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
from megatron_spice.rollout.placement import remote_engines

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
    if num_nodes == 1 and machine.device(config.cluster.device) == "cpu":
        return f"# Start\nbash slurm/spice.sh {words}\n"
    per_node = config.cluster.ranks_per_node
    accelerators = f" --gpus-per-node={per_node}" if machine.device(config.cluster.device) == "cuda" else ""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines() if SCRIPT.is_file() else []
    directives = [line for line in lines if line.startswith("#SBATCH") and not line.startswith("#SBATCH --nodes")]
    asked, told = _ending(config, num_nodes, calibration)
    if asked:
        directives = [f"#SBATCH{asked}" if line.startswith("#SBATCH --signal=") else line for line in directives]
    start = ["# Start", f"sbatch --nodes={num_nodes}{accelerators}{asked} slurm/spice.sh {words}", *directives, *told]
    return "\n".join([*start, *_without_slurm(config, num_nodes, words), ""])


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
    """What sbatch is asked for if the job wants to hear of its time limit earlier than the script asks by itself, and in words how
    long Slurm must wait for it when it ends it before; nothing where the recipe cannot be judged."""
    constants = read_device(calibration or default_file(machine.device(config.cluster.device)))
    try:
        shape = read_architecture(config.policy.model)
        judged = (config, shape, num_nodes, constants, machine.usable_cores())
        warning, (playing, longest) = estimate.warning_seconds(*judged), estimate.ending_seconds(*judged)
    except ConfigError:
        return "", []
    told = [
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
    """Megatron numbers ranks with the tensor-parallel rank fastest, then context, then data, then the pipeline stage."""
    per_node, ranks = config.cluster.ranks_per_node, layout.world_size
    lines = [
        f"# Ranks: {ranks} = tensor {layout.tensor} x context {layout.context} x data {layout.data} x pipeline "
        f"{layout.pipeline}, {num_nodes} x {per_node}, on {machine.device(config.cluster.device)}: {layout.describe()}",
        "rank  node  local  tensor  context  data  expert  pipeline  layers",
    ]
    for rank in range(min(ranks, RANKS_SHOWN)):
        rest, tensor = divmod(rank, layout.tensor)
        rest, context = divmod(rest, layout.context)
        pipeline, data = divmod(rest, layout.data)
        expert = rank % (ranks // layout.pipeline) % layout.expert
        chunks = [layout.layers_of(chunk) for chunk in range(pipeline, len(layout.chunk_layers), layout.pipeline)]
        layers = " ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks)
        lines.append(
            f"{rank:>4}  {rank // per_node:>4}  {rank % per_node:>5}  {tensor:>6}  {context:>7}  {data:>4}  {expert:>6}  "
            f"{pipeline:>8}  {layers}"
        )
    if ranks > RANKS_SHOWN:
        lines.append(f"... and {ranks - RANKS_SHOWN} more")
    return "\n".join(lines) + "\n"


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
        f"{passages} passages an iteration, {passages / total:g} an engine on average\n"
    )

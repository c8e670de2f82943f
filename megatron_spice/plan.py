"""What a recipe would start, said without starting it: settings, ranks and their places, engines, paths.

For now it says where everything goes; what it costs in memory and time is not estimated yet.
"""

from __future__ import annotations

import shlex

from megatron_spice import machine
from megatron_spice.config.checks import check, check_layout, check_paths
from megatron_spice.config.describe import resolved
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import Config

RANKS_SHOWN = 64


def describe(config: Config, num_nodes: int) -> tuple[str, list[str]]:
    """The plan as text, and what is in its way (empty when the recipe can run here)."""
    problems: list[str] = []
    model = "not readable"
    try:
        shape = check(config, num_nodes)
        model = (
            f"{shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"{shape.num_attention_heads} heads, {shape.num_query_groups} key/value heads, vocabulary {shape.vocab_size}"
        )
    except ConfigError as error:
        problems = error.problems
    parts = [f"# Recipe, with every default filled in\n{resolved(config)}", f"# Model\n{model}\n", _paths(config)]
    if not check_layout(config, num_nodes):
        parts += [_ranks(config, num_nodes), _engines(config, num_nodes)]
    return "\n".join(parts), problems


def launch_environment(config: Config) -> str:
    """What slurm/spice.sh needs to know, as shell assignments that `eval` can read."""
    values = {
        "SPICE_RANKS_PER_NODE": config.cluster.ranks_per_node,
        "SPICE_DEVICE_KIND": machine.device(config.cluster.device),
        "SPICE_RUN_DIR": config.run.dir,
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


def _ranks(config: Config, num_nodes: int) -> str:
    """Megatron numbers ranks with the tensor-parallel rank fastest, then data, then the pipeline stage."""
    tensor, pipeline = config.policy.tensor_parallel_size, config.policy.pipeline_parallel_size
    per_node = config.cluster.ranks_per_node
    ranks = num_nodes * per_node
    data = ranks // (tensor * pipeline)
    lines = [
        f"# Ranks: {ranks} = tensor {tensor} x data {data} x pipeline {pipeline}, {num_nodes} x {per_node}, "
        f"on {machine.device(config.cluster.device)}",
        "rank  node  local  tensor  data  pipeline",
    ]
    for rank in range(min(ranks, RANKS_SHOWN)):
        lines.append(
            f"{rank:>4}  {rank // per_node:>4}  {rank % per_node:>5}  {rank % tensor:>6}  "
            f"{rank // tensor % data:>4}  {rank // (tensor * data):>8}"
        )
    if ranks > RANKS_SHOWN:
        lines.append(f"... and {ranks - RANKS_SHOWN} more")
    return "\n".join(lines) + "\n"


def _engines(config: Config, num_nodes: int) -> str:
    per_node, size = config.rollout.engines_per_node, config.rollout.tensor_parallel_size
    passages = config.train.passages
    total = per_node * num_nodes
    return (
        f"# Rollout engines: {total} ({per_node} a node), {size} rank{'s' if size > 1 else ''} each; they share "
        f"{passages} passages an iteration, {passages / total:g} an engine on average\n"
    )

"""Our side of `tools/benchmark.py iteration`: a recipe run as users run it, and what its logs say was trained on.

The run is `slurm/spice.sh` with the environment of a shell, not of a benchmark's rank. Its prompts are made again from
episodes.jsonl by the code that made them, and their number of tokens has to be the one that the run counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iteration_trl import Batch

from megatron_spice.cluster.children import PARENT_VARIABLE, Child
from megatron_spice.config.schema import Config
from megatron_spice.game.prompts import PromptStyle
from megatron_spice.game.records import Passage, Task, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# The launcher sets these for its own ranks, unless they are set already.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLIBC_TUNABLES", "GLOO_SOCKET_IFNAME", PARENT_VARIABLE)
_OF_A_RANK_PREFIXES = ("LOCAL_", "OMP_", "GOMP_", "SLURM_")
# torchrun itself does not ask to end with its parent; what asks for it keeps the request through `exec`.
_FOLLOW = (
    "import os, sys; from megatron_spice.cluster.children import PARENT_VARIABLE, die_with_parent; "
    "die_with_parent(int(os.environ.pop(PARENT_VARIABLE))); os.execvp(sys.argv[1], sys.argv[1:])"
)


def run_recipe(recipe: str, overrides: Sequence[str], log: Path) -> None:
    """Trains a recipe to its end.

    Raises:
        RuntimeError: it failed; with the last lines of its log.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_A_RANK and not name.startswith(_OF_A_RANK_PREFIXES)
    }
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    environment |= {"SPICE_VENV": sys.prefix, "PYTHONPATH": path}
    command = [sys.executable, "-c", _FOLLOW, "bash", str(ROOT / "slurm" / "spice.sh"), recipe, *overrides]
    job = Child(command, log_path=log, environment=environment)
    try:
        while (code := job.exit_code()) is None:
            time.sleep(0.5)
    finally:
        job.stop()
    if code:
        raise RuntimeError(f"the run of {recipe} ended with exit code {code}:\n{job.log_tail(40)}")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The run's iterations, as they were logged."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_batches(run_dir: Path, config: Config, style: PromptStyle, tokenizer: Tokenizer) -> dict[int, Batch]:
    """What each iteration trained on: its Challenger groups, then its Reasoner groups, which not every passage has.

    Raises:
        RuntimeError: the prompts made again are not those that were trained on.
    """
    episodes: dict[int, list[dict[str, Any]]] = {}
    for line in (run_dir / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        episodes.setdefault(episode["iteration"], []).append(episode)
    batches = {}
    for metrics in read_metrics(run_dir):
        number = int(metrics["iteration"])
        groups = trained_groups(episodes[number], config, style, tokenizer)
        batch = Batch([prompt for prompt, _ in groups], [lengths for _, lengths in groups], metrics["seconds/iteration"])
        trained = round(metrics["tokens_per_second"] * metrics["seconds/iteration"])
        if batch.num_tokens != trained:
            raise RuntimeError(f"iteration {number} trained on {trained} tokens, its log makes {batch.num_tokens}")
        batches[number] = batch
    return batches


def trained_groups(
    episodes: Sequence[dict[str, Any]], config: Config, style: PromptStyle, tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and lengths of the completions of each group of an iteration, from its records; Challengers' first."""
    challenger, reasoner = [], []
    for episode in sorted(episodes, key=lambda episode: episode["slot"]):
        about, attempts = episode["passage"], episode["attempts"]
        passage = Passage(about["index"], about["document"], about["source"], (), about["text"])
        prompt = style.challenger_prompt(None if config.game.no_corpus else passage, episode["answer_type"])
        lengths = [attempt["tokens"] for attempt in attempts if attempt["in_group"]]
        challenger.append((tokenizer.encode_prompt(prompt), lengths))
        for attempt in attempts:
            if attempt["is_reasoner_task"]:
                prompt = style.reasoner_prompt(Task(**attempt["task"]))
                reasoner.append((tokenizer.encode_prompt(prompt), [answer["tokens"] for answer in attempt["answers"]]))
    return reasoner if config.game.fixed_challenger else challenger + reasoner


def generated_tokens(run_dir: Path) -> dict[int, int]:
    """Completion tokens that each iteration generated, those included that were not trained on."""
    counts: dict[int, int] = {}
    for line in (run_dir / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        attempts = episode["attempts"]
        written = [*attempts, *(answer for attempt in attempts for answer in attempt["answers"])]
        counts[episode["iteration"]] = counts.get(episode["iteration"], 0) + sum(each["tokens"] for each in written)
    return counts

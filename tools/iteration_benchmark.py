"""`tools/benchmark.py iteration`: whole iterations of a recipe, alone or in turn with TRL's GRPOTrainer.

Ours is a run of the recipe as users start it (slurm/spice.sh), with `--model` as its model, whose first iteration is not
counted. `--against trl`: after each of our runs TRL takes as many optimiser steps as `--their-steps` on exactly the
sequences of that run's iterations: same prompts, same number of tokens in each completion (iteration_trl.py). Both have the
whole machine while they run. Starting up counts for neither.

Tokens a second are those of what is trained on, prompt and completion of each sequence, in the seconds of a whole iteration:
generation, verification, training, sync and all that lies between. What ours generates besides (answers to tasks that pay the
Challenger but are not trained on) is in its seconds and not in its tokens.

`outside` is the share of an iteration that is neither generation and verification (`play`), nor training (`train`), nor the
way of the weights to the engines with the policy's going to sleep (`sync`): what is in no phase (`other`) and the hand-over
of the machine back to the policy (`wake`). An iteration in which a passage has no task has fewer sequences; TRL, whose batches
are all of one size, skips it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_options import columns, need_model_folder, positive, refuse

from megatron_spice import machine

HELP = "whole iterations of a recipe, alone or in turn with TRL's"
PHASES = ("play", "train", "sync", "wake", "save", "recover", "other")
INSIDE = ("play", "train", "sync")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder; both sides train it")
    parser.add_argument("--recipe", default="examples/quickstart.yaml", help="default examples/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="of the recipe; may be repeated")
    parser.add_argument("--against", choices=["trl"], help="in turn with steps of TRL's GRPOTrainer (DrGRPO)")
    parser.add_argument("--rounds", type=positive, default=2, help="runs of ours, and of theirs after each (default 2)")
    parser.add_argument("--iterations", type=positive, default=3, help="timed iterations of each of our runs (default 3)")
    parser.add_argument("--their-steps", type=positive, default=2, help="timed steps of theirs after each (default 2)")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One; ends with a message where the model or the recipe cannot be read, or TRL is not there."""
    from megatron_spice.config.errors import ConfigError
    from megatron_spice.config.loader import load_config

    need_model_folder(options.model)
    if options.against and machine.version("trl") is None:
        refuse("--against trl needs TRL: bash install.sh --test (Python 3.11)")
    overrides = [*options.set, f"policy.model={options.model}"]
    try:
        config = load_config(options.recipe, overrides)
    except ConfigError as error:
        refuse(str(error))
    return [{
        "title": f"{options.recipe} {config.policy.precision}", "ranks": 1, "model": options.model,
        "threads": options.threads or machine.usable_cores(), "recipe": options.recipe,
        "overrides": [*overrides, f"train.seed={options.seed}"],
        **{key: getattr(options, key) for key in ("against", "rounds", "iterations", "their_steps")},
    }]  # fmt: skip


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures the job, each side in processes of its own."""
    from iteration_trl import Shape, measure, run_theirs

    if "theirs" in job:
        result.write_text(json.dumps(measure(job["theirs"])))
        return
    shape = None
    found: dict[str, Any] = {"title": job["title"], "rounds": []}
    for number in range(1, job["rounds"] + 1):
        with tempfile.TemporaryDirectory(prefix="spice-iteration-") as folder:
            ours, batches = _ours(job, Path(folder))
            chosen = dict(list(batches.items())[: job["their_steps"]])
            theirs = run_theirs(job["model"], list(chosen.values()), shape, Path(folder)) if job["against"] else None
        print(f"round {number}: ours {ours}", file=sys.stderr, flush=True)
        round_: dict[str, Any] = {"ours": ours, "theirs": []}
        if theirs is not None:
            if shape is None:
                shape, found["shapes"] = theirs["shape"], theirs["tried"]
                found["shape"] = Shape(**shape).describe()
            for (iteration, batch), took in zip(chosen.items(), theirs["seconds"], strict=True):
                round_["theirs"].append({"iteration": iteration, "tokens": batch.num_tokens, "seconds": took})
        found["rounds"].append(round_)
    result.write_text(json.dumps(found | summary(found["rounds"])))


def _ours(job: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    """The timed iterations of one run, and of those that TRL can repeat what they trained on."""
    from iteration_run import generated_tokens, read_batches, read_metrics, run_recipe

    from megatron_spice.config.loader import load_config
    from megatron_spice.corpus.tokenizer import TextTokenizer
    from megatron_spice.game.styles import style_for

    run_dir, iterations = folder / "run", job["iterations"] + 1
    overrides = [
        *job["overrides"], f"run.dir={run_dir}", f"train.iterations={iterations}", f"checkpoint.every={iterations}",
        "telemetry.episodes=true",
    ]  # fmt: skip
    run_recipe(job["recipe"], overrides, folder / "run.log")
    config = load_config(job["recipe"], overrides)
    tokenizer = TextTokenizer.from_dir(Path(job["model"]))
    batches = read_batches(run_dir, config, style_for(config.game.prompt_style, tokenizer), tokenizer)
    generated, timed = generated_tokens(run_dir), []
    for line in read_metrics(run_dir)[1:]:
        number = int(line["iteration"])
        timed.append({
            "iteration": number, "tokens": batches[number].num_tokens, "seconds": line["seconds/iteration"],
            "sequences": sum(map(len, batches[number].lengths)), "generated_tokens": generated[number],
            "trained_completion_tokens": sum(map(sum, batches[number].lengths)),
            "metrics": line, "phases": {name: line[f"seconds/{name}"] for name in PHASES if f"seconds/{name}" in line},
        })  # fmt: skip
    return timed, even_batches({number: batch for number, batch in batches.items() if number > 1})


def even_batches(batches: Mapping[int, Any]) -> dict[int, Any]:
    """Those with the most groups: TRL's batches are all of one size, and a passage without a task has a group less."""
    most = max(len(batch.prompts) for batch in batches.values())
    return {number: batch for number, batch in batches.items() if len(batch.prompts) == most}


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of both sides by round and over all, their ratios, and the shares of an iteration's seconds."""
    speeds = {side: [_speed(each[side]) for each in rounds if each[side]] for side in ("ours", "theirs")}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["theirs"])]
    iterations = [iteration for each in rounds for iteration in each["ours"]]
    total = sum(iteration["seconds"] for iteration in iterations)
    seconds = {name: sum(iteration["phases"].get(name, 0.0) for iteration in iterations) for name in PHASES}
    outside = [1 - sum(each["phases"].get(name, 0.0) for name in INSIDE) / each["seconds"] for each in iterations]
    same = [
        their["seconds"] / our["seconds"]
        for each in rounds for their in each["theirs"] for our in each["ours"] if our["iteration"] == their["iteration"]
    ]  # fmt: skip
    return {
        "tokens_per_second": statistics.median(speeds["ours"]), "all_tokens_per_second": speeds, "ratios": ratios,
        "their_tokens_per_second": statistics.median(speeds["theirs"]) if ratios else None,
        "ratio": statistics.median(ratios) if ratios else None, "ratios_of_iterations": same,
        "shares": {name: spent / total for name, spent in seconds.items()}, "outside": statistics.median(outside),
        "most_outside": max(outside),
    }  # fmt: skip


def _speed(iterations: Sequence[dict[str, Any]]) -> float:
    return sum(each["tokens"] for each in iterations) / sum(each["seconds"] for each in iterations)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Both sides by round, with the ratio of each, then where an iteration's time goes."""
    lines = []
    for result in results:
        rows = [["round", "side", "iterations", "s/iteration", "tokens/iteration", "tokens/s", "ours/theirs"]]
        for number, each in enumerate(result["rounds"], 1):
            for side in ("ours", "theirs"):
                if each[side]:
                    seconds, tokens = ([one[key] for one in each[side]] for key in ("seconds", "tokens"))
                    ratio = f"{result['ratios'][number - 1]:.2f}" if side == "theirs" else ""
                    rows.append([
                        str(number), side, str(len(seconds)), f"{statistics.mean(seconds):.2f}",
                        f"{statistics.mean(tokens):.0f}", f"{_speed(each[side]):.0f}", ratio,
                    ])  # fmt: skip
        lines.append(columns(rows))
        if result["ratio"] is not None:
            lines.append(f"tokens trained on a second, ours / theirs: {result['ratio']:.2f} (median of the rounds)")
            lines.append("same iterations: " + ", ".join(f"{ratio:.2f}" for ratio in result["ratios_of_iterations"]))
            tried = ", ".join(f"{seconds:.1f} s {shape}" for shape, seconds in result["shapes"].items())
            lines.append(f"theirs ran with {result['shape']}; tried: {tried}")
        ours = [iteration for each in result["rounds"] for iteration in each["ours"]]
        generated, trained = (sum(one[key] for one in ours) for key in ("generated_tokens", "trained_completion_tokens"))
        lines.append(f"completion tokens ours generated: {generated}, of which trained on: {trained}")
        lines.append("share of an iteration: " + ", ".join(f"{name} {part:.2%}" for name, part in result["shares"].items()))
        lines.append(
            f"outside generation, verification, training and sync: {result['outside']:.2%} (median), "
            f"{result['most_outside']:.2%} at most"
        )
    return "\n".join(lines)

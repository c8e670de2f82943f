"""`tools/benchmark.py calibrate`: measures what the cost model of `plan` is made of, and how far off its predictions are.

The real parts are measured in small cases: updates of the policy by shape and layout, batches of an engine, the weights' way to
it, and saves; and on a CPU two runs of the quickstart's recipe, whose corpus must be there. Some cases give the constants (rates
and fixed times, by least squares of relative errors); the others are predicted with them and not used for them (`held out`).
`--output` gets `calibration.json`, which
`python -m megatron_spice plan RECIPE --calibration FILE` takes, beside the cases with prediction and measurement.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_options import need_model_folder, positive, refuse

from megatron_spice import machine

HELP = "the cost model's constants for this machine"

# layout, layers, groups, prompt, completion, row tokens; and whether the constants come from it
UPDATES = [
    ("tp=1", 8, 4, 160, 32, 3072, True), ("tp=1", 8, 4, 160, 32, 640, True), ("tp=1", 4, 2, 512, 64, 2048, True),
    ("tp=1", 8, 4, 48, 16, 512, True), ("dp=2", 8, 4, 160, 32, 640, True), ("pp=2", 8, 4, 160, 32, 640, True),
    ("tp=2", 8, 4, 160, 32, 640, True), ("tp=2", 4, 2, 48, 16, 512, True), ("tp=1", 12, 3, 256, 40, 1024, False),
    ("dp=2", 6, 6, 96, 24, 768, False), ("pp=2", 12, 4, 128, 32, 512, False), ("tp=2", 6, 4, 128, 32, 768, False),
]  # fmt: skip
# prompts, prompt tokens, samples, completion tokens
BATCHES = [
    (4, 320, 8, 48, True), (28, 120, 8, 12, True), (1, 320, 8, 48, True), (8, 64, 1, 64, True), (2, 1024, 4, 32, True),
    (6, 200, 8, 32, False), (16, 100, 8, 16, False), (2, 512, 8, 64, False),
]  # fmt: skip

KINDS = ("policy", "engine", "sync", "checkpoint", "iteration")
RECIPE = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
ROUNDS = 5
"""Of the cases that take less than a second, in turn: what else a machine does for a minute then falls on all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=positive, default=5, help="timed repetitions of each case, or of each of its rounds (default 5)")
    parser.add_argument("--only", help=f"kinds of case, with commas between them (default {','.join(KINDS)}; on a GPU without {KINDS[-1]})")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases; those of an engine are one job."""
    need_model_folder(options.model)
    device = machine.device("auto")
    kinds = options.only.split(",") if options.only else KINDS if device == "cpu" else KINDS[:-1]
    if unknown := set(kinds) - set(KINDS):
        refuse(f"--only {','.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    cores = machine.usable_cores()
    shared = {"device": device, "seed": options.seed, "steps": options.steps, "precision": options.precision}
    found = [_update_job(case, shared, cores) for case in UPDATES if "policy" in kinds]
    if "engine" in kinds:
        batches = [dict(zip(("prompts", "prompt", "samples", "completion", "calibrates"), batch)) for batch in BATCHES]
        found.append({**shared, "kind": "engine", "title": "engine", "ranks": 1, "threads": cores, "model": options.model, "batches": batches})
    if "iteration" in kinds:
        found.append(_runs(options, shared, cores))
    precisions = dict.fromkeys((options.precision, "fp32"))
    short = []
    for precision in precisions if "sync" in kinds else ():
        rollout = {"bucket_mb": 256, "max_total_tokens": 4096, "server": {}}
        short.append({**shared, "kind": "sync", "title": f"sync {precision}", "ranks": 1, "threads": cores, "model": options.model,
                      "layers": None, "precision": precision, "rollout": rollout, "calibrates": True})  # fmt: skip
    for precision, ranks in [(each, ranks) for each in precisions for ranks in (1, 2)] if "checkpoint" in kinds else ():
        short.append({**shared, "kind": "checkpoint", "title": f"save {precision} DP={ranks}", "ranks": ranks, "precision": precision,
                      "threads": max(1, cores // ranks), "model": options.model, "folder": None, "whole": False,
                      "calibrates": precision == options.precision})  # fmt: skip
    found += short * ROUNDS
    return found


def _runs(options: argparse.Namespace, shared: dict[str, Any], cores: int) -> dict[str, Any]:
    from megatron_spice.config.errors import ConfigError
    from megatron_spice.config.loader import load_config

    overrides = [f"policy.model={options.model}", f"policy.precision={options.precision}", f"train.seed={options.seed}"]
    if shared["device"] != "cpu":
        refuse("--only iteration is for CPUs: there the quickstart's recipe is what it is counted as")
    try:
        corpus = load_config(RECIPE, overrides).corpus.path
    except ConfigError as error:
        refuse(str(error))
    if not (corpus / "manifest.json").exists():
        without = ",".join(kind for kind in KINDS if kind != "iteration")
        refuse(f"the corpus of {RECIPE}, {corpus}, is not there: bash examples/quickstart.sh makes it; without whole runs: --only {without}")
    return {
        **shared, "kind": "iteration", "title": "runs of the quickstart", "ranks": 1, "threads": cores, "model": options.model,
        "recipe": os.path.relpath(RECIPE), "overrides": overrides, "against": None, "rounds": 2, "iterations": options.steps, "their_steps": 0,
    }  # fmt: skip


def _update_job(case: tuple[Any, ...], shared: dict[str, Any], cores: int) -> dict[str, Any]:
    from policy_suite import parse_layout

    layout, layers, groups, prompt, completion, row_tokens, calibrates = case
    ranks, settings = parse_layout(layout)
    title = f"{layout} {layers} layers, {groups} x 8 of {prompt} + {completion}, rows of {row_tokens}"
    return {
        **shared, "kind": "policy", "title": title, "ranks": ranks, "layout": layout, "settings": settings, "layers": layers,
        "groups": groups, "group_size": 8, "prompts": [prompt], "completion": completion, "row_tokens": row_tokens,
        "model": "small", "shared": True, "against": None, "profile": None, "warm_up": True, "threads": max(1, cores // ranks),
        "calibrates": calibrates,
    }  # fmt: skip


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures a case by the code of its own suite."""
    import calibrate_engine
    import checkpoint_benchmark
    import iteration_benchmark
    import policy_benchmark
    import sync_benchmark

    suites = {
        "policy": policy_benchmark, "engine": calibrate_engine, "iteration": iteration_benchmark, "sync": sync_benchmark,
        "checkpoint": checkpoint_benchmark,
    }  # fmt: skip
    suites[job["kind"]].run_rank(job, result)
    if result.exists():
        result.write_text(json.dumps({"job": job, **json.loads(result.read_text())}))


def cases_of(results: Sequence[dict[str, Any]], architecture: Any = None) -> list[Any]:
    """What the cost model makes of the results. `architecture` is that of the engine's model, where its folder is not here."""
    import cost_cases

    from megatron_spice.config.hf import read_architecture

    found: list[Any] = []
    for result in results:
        job = result["job"]
        rounds = [each for each in results if each["job"]["title"] == job["title"]]
        if result is not rounds[0]:
            continue
        if job["kind"] == "policy":
            found.append(cost_cases.update_case(job, result["seconds"], cost_cases.architecture_of(job, {})))
        elif job["kind"] == "engine":
            found += cost_cases.engine_cases(result, architecture or read_architecture(Path(job["model"])), job["precision"])
        elif job["kind"] == "iteration":
            found += cost_cases.run_cases(job, result, architecture or read_architecture(Path(job["model"])))
        elif job["kind"] == "sync":
            seconds = cost_cases.quiet([each for found_in in rounds for each in found_in["all_seconds"]["sync"][1:]])
            found.append(cost_cases.sync_case(result["gib"], seconds, job["title"], job["calibrates"]))
        else:
            seconds = cost_cases.quiet([each for found_in in rounds for each in found_in["all_seconds"]["stall"][1:]])
            found.append(cost_cases.save_case(job, result["parts"]["stall"]["gib"], seconds))
    return found


def calibrated(results: Sequence[dict[str, Any]], architecture: Any = None, name: str | None = None) -> dict[str, Any]:
    """The device's file that follows from the results. `name`: of the device, if it is not this machine's."""
    import cost_fit

    from megatron_spice.cost.device import default_file, read_device

    about = machine.processor()
    before = read_device(cost_fit.ASSUMED if results[0]["job"]["device"] == "cpu" else default_file("cuda"))
    cases = cases_of(results, architecture)
    return cost_fit.calibration(name or f"{about['cores']} cores of {about['model']}", cases, before, "tools/benchmark.py calibrate")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Each case, measured and predicted by the constants that follow from those that calibrate."""
    if not results:
        return "nothing was measured"
    import cost_fit

    device = device_of(calibrated(results))
    return cost_fit.table(cases_of(results), device)


def finish(results: Sequence[dict[str, Any]], folder: Path, name: str) -> None:
    """Writes the calibration beside the results."""
    (folder / "calibration.json").write_text(json.dumps(calibrated(results), indent=1) + "\n")


def device_of(found: dict[str, Any]) -> Any:
    from megatron_spice.cost.device import Constant, Device

    return Device(found["device"], found["on_cpu"], {name: Constant(**about) for name, about in found["constants"].items()})

"""`tools/benchmark.py calibrate`: measures what the cost model of `plan` is made of, and how far off its predictions are.

The real parts are measured in small cases: updates of the policy by shape and layout, batches of an engine, the weights' way to
it, and saves. Some cases give the constants (rates and fixed times, by least squares of relative errors, none below zero); the
others are predicted with them and not used for them (`held out`). `--output` gets `calibration.json`, which
`python -m megatron_spice plan RECIPE --calibration FILE` takes, beside the cases with prediction and measurement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_options import columns, need_model_folder, positive, refuse

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=positive, default=3, help="timed repetitions of each case (default 3)")
    parser.add_argument("--only", default="policy,engine,sync,checkpoint", help="kinds of case, with commas between them")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases; those of an engine are one job."""
    need_model_folder(options.model)
    kinds = options.only.split(",")
    if unknown := set(kinds) - {"policy", "engine", "sync", "checkpoint"}:
        refuse(f"--only {','.join(sorted(unknown))} is none of policy, engine, sync, checkpoint")
    cores = machine.usable_cores()
    shared = {"device": machine.device("auto"), "seed": options.seed, "steps": options.steps, "precision": options.precision}
    found = [_update_job(case, shared, cores) for case in UPDATES if "policy" in kinds]
    if "engine" in kinds:
        batches = [dict(zip(("prompts", "prompt", "samples", "completion", "calibrates"), batch)) for batch in BATCHES]
        found.append({**shared, "kind": "engine", "title": "engine", "ranks": 1, "threads": cores, "model": options.model, "batches": batches})
    for precision in (options.precision, "fp32") if "sync" in kinds else ():
        rollout = {"bucket_mb": 256, "max_total_tokens": 4096, "server": {}}
        found.append({**shared, "kind": "sync", "title": f"sync {precision}", "ranks": 1, "threads": cores, "model": options.model,
                      "layers": None, "precision": precision, "rollout": rollout, "calibrates": precision == options.precision})  # fmt: skip
    for ranks in (1, 2) if "checkpoint" in kinds else ():
        found.append({**shared, "kind": "checkpoint", "title": f"save DP={ranks}", "ranks": ranks, "threads": max(1, cores // ranks),
                      "model": options.model, "folder": None, "calibrates": ranks == 1})  # fmt: skip
    return found


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
    import policy_benchmark
    import sync_benchmark

    suites = {"policy": policy_benchmark, "engine": calibrate_engine, "sync": sync_benchmark, "checkpoint": checkpoint_benchmark}
    suites[job["kind"]].run_rank(job, result)
    if result.exists():
        result.write_text(json.dumps({"job": job, **json.loads(result.read_text())}))


def cases_of(results: Sequence[dict[str, Any]]) -> list[Any]:
    """What the cost model makes of the results."""
    import cost_cases

    from megatron_spice.config.hf import read_architecture

    found: list[Any] = []
    for result in results:
        job = result["job"]
        if job["kind"] == "policy":
            found.append(cost_cases.update_case(job, result["seconds"], cost_cases.architecture_of(job, {})))
        elif job["kind"] == "engine":
            found += cost_cases.engine_cases(result, read_architecture(Path(job["model"])))
        elif job["kind"] == "sync":
            found.append(cost_cases.sync_case(result, job["title"], job["calibrates"]))
        else:
            found.append(cost_cases.save_case(result, job["title"], job["calibrates"]))
    return found


def calibrated(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The device's file that follows from the results."""
    import cost_cases

    from megatron_spice.cost.device import default_file, read_device

    about = machine.processor()
    before = read_device(default_file(machine.device("auto")))
    return cost_cases.calibration(
        f"{about['cores']} cores of {about['model']}", cases_of(results), before, "tools/benchmark.py calibrate"
    )  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Each case, measured and predicted by the constants that follow from those that calibrate."""
    if not results:
        return "nothing was measured"
    device = _device(calibrated(results))
    rows = [["part", "case", "", "measured s", "predicted s", "off"]]
    for case in cases_of(results):
        predicted = device.seconds(case.work, case.threads)
        rows.append([case.part, case.name, "" if case.calibrates else "held out", f"{case.seconds:.3f}", f"{predicted:.3f}", f"{case.off(device):+.1%}"])
    return columns(rows)


def finish(results: Sequence[dict[str, Any]], folder: Path, name: str) -> None:
    """Writes the calibration beside the results."""
    (folder / "calibration.json").write_text(json.dumps(calibrated(results), indent=1) + "\n")


def _device(found: dict[str, Any]) -> Any:
    from megatron_spice.cost.device import Constant, Device

    return Device(found["device"], found["on_cpu"], {name: Constant(**about) for name, about in found["constants"].items()})

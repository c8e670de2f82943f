#!/usr/bin/env python3
"""Measured cases of the cost model: from the results of benchmarks, the work that the model counts and the seconds it took.
`cost_fit.py` makes constants of them.

    python tools/cost_cases.py HUGGING_FACE_FOLDER            the cases in docs/results beside what the package's file predicts
    python tools/cost_cases.py HUGGING_FACE_FOLDER --write    and makes that file anew from them
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from cost_fit import ASSUMED, Case, calibration, table  # noqa: E402
from policy_benchmark import make_trajectories, stack_config  # noqa: E402

from megatron_spice.config.hf import ModelArchitecture, read_architecture  # noqa: E402
from megatron_spice.config.layout import ParallelLayout  # noqa: E402
from megatron_spice.config.schema import PolicyConfig  # noqa: E402
from megatron_spice.cost.device import added, default_file, read_device  # noqa: E402
from megatron_spice.cost.estimate import save_work  # noqa: E402
from megatron_spice.cost.play import Batch, EngineShape, batch_work, play_work  # noqa: E402
from megatron_spice.cost.update import update_work  # noqa: E402
from megatron_spice.game.records import Trajectory  # noqa: E402
from megatron_spice.policy.memory_budget import bytes_saved, bytes_written  # noqa: E402
from megatron_spice.policy.packing import Block, Cost, Row, plan_rows  # noqa: E402
from megatron_spice.policy.parameter_count import RankParameters  # noqa: E402


def architecture_of(job: Mapping[str, Any], shapes: Mapping[str, ModelArchitecture]) -> ModelArchitecture:
    """A stack's, or that of a Hugging Face folder's name among `shapes`."""
    name = Path(job["model"]).name
    return shapes[name] if name in shapes else ModelArchitecture.from_config(stack_config(job["model"], job["layers"]), job["model"])


def update_case(job: Mapping[str, Any], seconds: Sequence[float], architecture: ModelArchitecture) -> Case:
    """A job of the policy suite."""
    settings = {"precision": job["precision"], "tokens_per_microbatch": job["row_tokens"], "model": job["model"], **job["settings"]}
    config = PolicyConfig.model_validate(settings)
    layout = ParallelLayout.of(config, architecture, job["ranks"])
    trajectories = make_trajectories(dict(job), architecture.vocab_size)
    multiple = layout.pipeline if layout.virtual > 1 else 1
    plan = plan_rows(trajectories, job["row_tokens"], layout.data, job["shared"], Cost.of(architecture), multiple)
    work = update_work(architecture, config, layout, plan[0], job["ranks"])
    threads = job["threads"] or 1 if job.get("device", "cpu") == "cpu" else 1  # an accelerator's rates are not a host core's
    return Case(job["title"], "train", work, threads, statistics.median(seconds), job["calibrates"])


def iteration_cases(
    metrics: Mapping[str, float], architecture: ModelArchitecture, name: str, calibrates: bool, ranks: int = 2, cores: int = 2,
    precision: str = "bf16",
) -> list[Case]:  # fmt: skip
    """The phases of an iteration of the quickstart's recipe, by what its metrics say was played and trained on."""
    settings = {"model": "unused", "precision": precision, "pipeline_parallel_size": ranks, "tokens_per_microbatch": 640}
    config = PolicyConfig.model_validate(settings)
    layout = ParallelLayout.of(config, architecture, ranks)
    rows = even_rows(metrics["policy/tokens"], metrics["policy/completion_tokens"], 640)
    train = update_work(architecture, config, layout, rows, ranks)
    challenger, reasoner = played_batches(metrics)
    play = play_work(architecture, _engine(precision), [challenger, reasoner])
    sync = {"copy": metrics["sync/gib"] * 2**30, "push": 1.0, "hand_over": 1.0, "check": 1.0}
    return [
        Case(f"{name} {part}", part, work, max(1, cores // ranks), metrics[f"seconds/{part}"], calibrates)
        for part, work in (("play", play), ("train", train), ("sync", sync), ("wake", {"hand_over": 1.0}))
    ]


def _engine(precision: str) -> EngineShape:
    size = 4.0 if precision == "fp32" else 2.0
    return EngineShape(weight_bytes=size, cache_bytes=size)


def run_cases(job: Mapping[str, Any], result: Mapping[str, Any], architecture: ModelArchitecture) -> list[Case]:
    """The phases of runs of the quickstart's recipe, of each phase the iteration with the median time, of those that had a task. The
    first run calibrates, the others are held out."""
    found = []
    for number, round_ in enumerate(result["rounds"], 1):
        phases: dict[str, list[Case]] = {}
        for each in [each for each in round_["ours"] if "reasoner/length" in each["metrics"]]:
            name = f"run {number} iteration {each['iteration']}"
            for case in iteration_cases(
                each["metrics"], architecture, name, number == 1, cores=job["threads"], precision=job["precision"]
            ):  # fmt: skip
                phases.setdefault(case.part, []).append(case)
        found += [sorted(cases, key=lambda case: case.seconds)[len(cases) // 2] for cases in phases.values()]
    return found


def played_batches(metrics: Mapping[str, float]) -> tuple[Batch, Batch]:
    """What an iteration's engine wrote: passages of four in flight, 8 samples a request, prompts as long as the corpus and the
    examples in them make them on average."""
    attempts, tasks = metrics["challenger/attempts"], metrics["reasoner/tasks"]
    rounds = 1 + round((attempts - 32) / 8)  # one passage's further attempts follow its first
    return (
        Batch(round(attempts / 8), 245, _lengths(metrics["challenger/length"], round(attempts), 48 * rounds)),
        Batch(round(tasks), 65, _lengths(metrics["reasoner/length"], round(tasks * 8), 12)),
    )


def _lengths(mean: float, count: int, longest: float) -> list[float]:
    """So many lengths of this mean, of which one is the longest."""
    rest = (mean * count - longest) / max(1, count - 1)
    return [longest, *([max(1.0, rest)] * (count - 1))]


def even_rows(tokens: float, completions: float, budget: int) -> list[Row]:
    """Rows of equal size with so many tokens in all."""
    count = max(1, round(tokens / (0.8 * budget)))
    length = max(1, round(completions / count / 8))
    prompt = (0,) * max(1, round(tokens / count) - 8 * length)
    group = tuple(Trajectory("challenger", prompt, (0,) * length, (), 1.0, 0.0) for _ in range(8))
    return [(Block(prompt, group),) for _ in range(count)]


def engine_cases(result: Mapping[str, Any], architecture: ModelArchitecture, precision: str) -> list[Case]:
    """Batches of `calibrate_engine.py`, each with its median run."""
    found = []
    for batch in result["batches"]:
        run = sorted(batch["runs"], key=lambda each: each["seconds"])[len(batch["runs"]) // 2]
        lengths = [float(length) for group in run["lengths"] for length in group]
        work = batch_work(architecture, _engine(precision), Batch(batch["prompts"], batch["prompt"], lengths))
        name = f"{batch['prompts']} prompts of {batch['prompt']}, {batch['samples']} x {batch['completion']}"
        found.append(Case(name, "play", work, 1, run["seconds"], batch["calibrates"]))
    return found


def sync_case(gib: float, seconds: float, name: str, calibrates: bool) -> Case:
    """A job of the sync suite."""
    return Case(name, "sync", {"copy": gib * 2**30, "push": 1.0}, 1, seconds, calibrates)


def quiet(seconds: Sequence[float]) -> float:
    """The fastest tenth of many repetitions: of what takes a fraction of a second and moves memory, most of the spread is what others
    who share the machine do to it."""
    return sorted(seconds)[len(seconds) // 10]


def save_case(job: Mapping[str, Any], written_gib: float, seconds: float) -> Case:
    """A job of the checkpoint suite: what an iteration waits for while each rank copies its part. What is written counts a float32
    weight twice, because it is its own master; it is copied once."""
    policy, one = PolicyConfig.model_validate({"model": "unused", "precision": job["precision"]}), RankParameters(1, 1, {})
    copied = written_gib * 2**30 / job["ranks"] * bytes_saved(policy, one) / bytes_written(policy, one)
    return Case(job["title"], "save", save_work(copied), 1, seconds, job["calibrates"])


def committed_cases(results: Path, model: Path | ModelArchitecture) -> list[Case]:
    """What lies in docs/results of one machine and version: updates, the sync, and iterations of the quickstart's recipe."""
    architecture = model if isinstance(model, ModelArchitecture) else read_architecture(model)
    cases = []
    for file, calibrates in (
        ("shared-against-transformers", (True,)), ("unshared-against-transformers", (True,)), ("shared-against-unshared", (False,)),
        ("layouts", (True, True, False, True)),
    ):  # fmt: skip
        report = json.loads((results / "policy-cpu" / f"{file}.json").read_text())
        for result, chosen in zip(report["results"], calibrates, strict=True):
            cases.append(update_case({**_job(report["command"], result["layout"]), "calibrates": chosen}, result["seconds"], architecture))
    [sync] = json.loads((results / "sync-cpu" / "sync.json").read_text())["results"]
    cases.append(sync_case(sync["gib"], sync["seconds"], "weights to an engine", True))
    [iteration] = json.loads((results / "iteration-cpu" / "iteration.json").read_text())["results"]
    for number, round_ in enumerate(iteration["rounds"]):
        for each in round_["ours"]:
            name = f"round {number + 1} iteration {each['iteration']}"
            cases += iteration_cases(each["metrics"], architecture, name, calibrates=number == 0)
    return cases


def committed_gpu_cases(results: Path) -> list[Case]:
    """What lies in docs/results/h100: updates of both cards, the sync of an 8B, and of the main job's second iterations what is
    neither play nor train: those compile kernels, and the engine had no graphs. A save's copies are queued and waited for in
    the next phase, so both are one case. They were used when h100.json was written, but not by least squares."""
    folder, cases = results / "h100", []
    for file, card in (
        ("policy_bf16", "H100"), ("policy_fp8", "H100"), ("policy_unshared", "H100"), ("h200_policy_before", "H200"),
        ("h200_policy_bf16", "H200, fused"), ("h200_policy_fp8", "H200, fused"),
    ):  # fmt: skip
        report = json.loads((folder / f"{file}.json").read_text())
        for result in report["results"]:
            job = {**_job(report["command"], result["layout"]), "precision": result["precision"], "calibrates": file in ("policy_bf16", "policy_fp8")}
            job["title"] = f"{card}, {job['precision']}{'' if job['shared'] else ', nothing shared'}"
            cases.append(update_case(job, result["seconds"], architecture_of(job, {})))
    [sync] = json.loads((folder / "sync_8b.json").read_text())["results"]
    cases.append(sync_case(sync["gib"], sync["seconds"], "H100, weights of an 8B to an engine", True))
    for precision in ("bf16", "fp8"):
        found = json.loads((folder / f"h200_iterations_{precision}.jsonl").read_text().splitlines()[1])
        state = found["save/gib"] * 2**30  # weights, masters and moments: what sleeps too
        hand_over = {"hand_over": 1.0, "save_copy": state}
        cases.append(Case(f"H200, {precision} iteration, wake", "wake", hand_over, 1, found["seconds/wake"], True))
        work = added(hand_over, {"copy": found["sync/gib"] * 2**30, "push": 1.0, "check": 1.0}, save_work(state))
        seconds = found["seconds/sync"] + found["seconds/save"]
        cases.append(Case(f"H200, {precision} iteration, sync and save", "sync", work, 1, seconds, True))
    return cases


def _job(command: str, layout: str) -> dict[str, Any]:
    """What a policy benchmark was asked, from its command and a result's layout."""
    import shlex

    from benchmark import _parser
    from policy_suite import parse_layout

    options = _parser().parse_args(shlex.split(command)[1:])
    described = dict(part.split("=") for part in layout.split() if "=" in part and "+" not in part)
    degrees = {key.lower(): value for key, value in described.items()}
    ranks, settings = parse_layout(",".join(f"{key}={value}" for key, value in degrees.items()))
    return {
        "title": f"{layout}, rows of {options.row_tokens}{', nothing shared' if options.unshared else ''}", "ranks": ranks,
        "settings": settings, "precision": options.precision, "shared": not options.unshared, "row_tokens": options.row_tokens,
        "prompts": options.prompt, "threads": options.threads,
        **{key: getattr(options, key) for key in ("model", "layers", "groups", "group_size", "completion", "seed")},
    }  # fmt: skip


def _main(arguments: Sequence[str]) -> None:
    folder, *rest = arguments
    results, path = ROOT / "docs" / "results", default_file("cpu")
    cases = committed_cases(results, Path(folder))
    if rest == ["--write"]:
        source = "least squares over docs/results/policy-cpu, sync-cpu and iteration-cpu"
        made = calibration("two cores of an AMD EPYC (AVX-512, bf16)", cases, read_device(ASSUMED), source)
        path.write_text(json.dumps(made, indent=1) + "\n")
    print(table(cases, read_device(path)), table(committed_gpu_cases(results), read_device(default_file("cuda"))), sep="\n\n")


if __name__ == "__main__":
    _main(sys.argv[1:])

"""`tools/benchmark.py policy`: what can be asked of it, the jobs that follow, and their results as a table.

Times updates (forward, backward, optimiser) of groups of equal prompts, by layout and precision. A layout is a list like
`tp=2,pp=2`, several are separated by semicolons; keys: tp, pp, vp, cp, ep, sp (0 or 1), dp. Each runs in fresh ranks, so
that its peak memory is its own. Tokens are those of all sequences, each with its own prompt, whether prompts are computed
once or not; TFLOP/s counts only what is computed (policy/flops.py). The ceiling is a bfloat16 matrix product of the model's
own shape, measured by the same ranks in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from benchmark_options import columns, need_model_folder, positive, refuse, several
from policy_benchmark import STACKS, run_rank

from megatron_spice import machine

__all__ = ["HELP", "add_arguments", "jobs", "run_rank", "table"]
HELP = "the policy's update, by layout and precision"
KEYS = {
    "tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "vp": "virtual_pipeline_size",
    "cp": "context_parallel_size", "ep": "expert_parallel_size", "sp": "sequence_parallel",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help=f"a Hugging Face folder, or random weights: {', '.join(STACKS)}")
    parser.add_argument("--layers", type=positive, help="so many layers of a stack with random weights")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16, fp8; several with commas (default bf16)")
    parser.add_argument("--layouts", default="tp=1", help="such as 'tp=1;pp=2;tp=2,cp=2' (default one rank)")
    parser.add_argument("--groups", type=positive, default=4)
    parser.add_argument("--group-size", type=positive, default=8)
    parser.add_argument(
        "--prompt", type=several, default=[160], metavar="N[,N...]", help="tokens of a group's prompt; several: in turn"
    )
    parser.add_argument("--completion", type=positive, default=32, help="tokens of each completion")
    parser.add_argument("--unshared", action="store_true", help="compute each prompt as often as it has completions")
    parser.add_argument("--row-tokens", type=positive, default=3072, help="policy.tokens_per_microbatch")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--steps", type=positive, default=3, help="timed updates; their median is reported")
    parser.add_argument(
        "--against", choices=["transformers", "unshared"],
        help="alternate with a plain transformers update (one rank), or with ours computing every prompt for every completion",
    )
    parser.add_argument("--profile", metavar="FILE", help="add a table of what one more update's time went into to this file")
    parser.add_argument("--no-warm-up", action="store_true", help="time the first updates too, where one takes minutes")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each layout and precision; ends with a message where the options do not fit each other."""
    if options.model not in STACKS:
        need_model_folder(options.model, f" and none of {', '.join(STACKS)}")
    if options.against == "unshared" and options.unshared:
        refuse("--against unshared compares with itself when --unshared is given: leave one of them out")
    if options.against == "transformers" and options.model in STACKS:
        refuse("--against transformers needs a Hugging Face folder as --model")
    device, found = machine.device("auto"), []
    for layout in options.layouts.split(";"):
        try:
            ranks, settings = parse_layout(layout)
        except ValueError as error:
            refuse(str(error))
        if options.against == "transformers" and ranks > 1:
            refuse(f"--against transformers compares one rank, the layout {layout!r} has {ranks}")
        for precision in options.precision.split(","):
            if precision not in ("fp32", "bf16", "fp8"):
                refuse(f"--precision {precision} is none of fp32, bf16, fp8")
            found.append({
                "layout": layout.strip(), "ranks": ranks, "settings": settings | {"recompute": options.recompute},
                "precision": precision, "device": device, "shared": not options.unshared, "row_tokens": options.row_tokens,
                "warm_up": not options.no_warm_up, "prompts": options.prompt, "title": f"{layout.strip()} {precision}",
                "threads": options.threads or max(1, machine.usable_cores() // ranks),
                **{key: getattr(options, key) for key in (
                    "model", "layers", "groups", "group_size", "completion", "steps", "seed", "against", "profile",
                )},
            })  # fmt: skip
    return found


def parse_layout(text: str) -> tuple[int, dict[str, Any]]:
    """`tp=2,pp=2,dp=2` as the number of ranks and `policy` settings.

    Raises:
        ValueError: an unknown key or something that is no number.
    """
    degrees = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key not in (*KEYS, "dp") or not value.isdigit():
            raise ValueError(f"{part!r} in the layout {text!r}: give KEY=NUMBER with one of {', '.join((*KEYS, 'dp'))}")
        degrees[key] = int(value)
    ranks = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1) * degrees.get("dp", 1)
    settings = {KEYS[key]: bool(value) if key == "sp" else value for key, value in degrees.items() if key in KEYS}
    return ranks, settings


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for people, a line a job."""
    shown = [
        ("layout", "layout", "{}"), ("precision", "precision", "{}"), ("s/update", "median", "{:.2f}"),
        ("tokens/s", "tokens_per_second", "{:.0f}"), ("computed", "computed_share", "{:.0%}"), ("TFLOP/s", "tflops", "{:.3g}"),
        ("ceiling", "ceiling_tflops", "{:.3g}"), ("share", "share_of_ceiling", "{:.0%}"), ("peak GiB", "peak_gib", "{:.1f}"),
        ("theirs s", "theirs", "{:.2f}"), ("theirs/ours", "ratio", "{:.2f}"),
    ]  # fmt: skip
    rows = [[title for title, _, _ in shown]]
    for result in results:
        values = {
            **result, "median": statistics.median(result["seconds"]),
            "computed_share": result["computed_tokens"] / result["tokens"],
            "theirs": statistics.median(result["their_seconds"]) if result["their_seconds"] else None,
        }  # fmt: skip
        rows.append(["-" if values[key] is None else form.format(values[key]) for _, key, form in shown])
    return columns(rows)

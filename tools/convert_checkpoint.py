#!/usr/bin/env python3
"""Checkpoints between Hugging Face folders and Megatron, tensor by tensor, in several processes.

    python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER TARGET
    python tools/convert_checkpoint.py megatron-to-hf runs/NAME/checkpoints/iteration_0000010 TARGET --dtype fp8
    python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER TARGET --format mp_rank --tensor-parallel-size 8
    python tools/convert_checkpoint.py megatron-to-hf MEGATRON_LM_FOLDER TARGET --hf HF_FOLDER
    python tools/convert_checkpoint.py inspect FOLDER --tensors
    python tools/convert_checkpoint.py compare ONE OTHER

Megatron here is torch_dist, which is free of any layout and what `policy.model` takes, or mp_rank, Megatron-LM's files for
each rank. Both directions read the one name table of `megatron_spice/weights/names.py`, the same that training syncs by. Memory
is that of a few tensors for each process. TARGET appears when it is whole; a conversion that was stopped goes on
when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_spice.config.errors import ConfigError  # noqa: E402

DEGREES = ("tensor", "pipeline", "virtual_pipeline", "expert")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Exit code 2 with a message when something is not what it must be; 1 when `compare` finds differences."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads what `inspect` or `compare` print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ConfigError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2


def _stopped(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("hf-to-megatron", to_megatron, "a Hugging Face folder (or another Megatron format) to a Megatron checkpoint"),
        ("megatron-to-hf", to_hf, "a Megatron checkpoint (or another Hugging Face folder) to a Hugging Face folder"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
        command.add_argument("--hf", type=Path, help="Hugging Face folder with config.json and tokenizer, if SOURCE has none")
        command.add_argument("--processes", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
        command.set_defaults(run=run, command=name)
        if run is to_hf:
            kinds = ["float32", "bfloat16", "fp8"]
            command.add_argument("--dtype", choices=kinds, help="default: as stored; fp8 is in blocks of 128 x 128")
            command.add_argument("--shard-size", type=_bytes, default=5 * 10**9, help="largest shard, such as 5GB (the default)")
        else:
            _add_layout(command)
    show = commands.add_parser("inspect", help="what a checkpoint of any kind holds")
    show.add_argument("folder", type=Path)
    show.add_argument("--hf", type=Path, help="as above")
    show.add_argument("--tensors", action="store_true", help="every tensor with its shape and precision")
    show.set_defaults(run=inspect)
    compare = commands.add_parser("compare", help="two checkpoints of any kinds, tensor by tensor")
    compare.add_argument("one", type=Path)
    compare.add_argument("other", type=Path)
    compare.add_argument("--hf", type=Path, help="as above")
    compare.set_defaults(run=compare_two)
    return parser


def _add_layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    command.add_argument("--format", choices=["torch_dist", "mp_rank"], default="torch_dist", help="default: torch_dist")
    layout = command.add_argument_group("the ranks of --format mp_rank")
    for degree in DEGREES:
        layout.add_argument(f"--{degree.replace('_', '-')}-parallel-size", type=_positive, default=1)
    layout.add_argument("--num-layers-per-virtual-pipeline-stage", type=_positive, help="instead of the number of virtual stages")
    layout.add_argument("--transformer-impl", choices=["local", "transformer_engine"], default="transformer_engine")


def to_megatron(options: argparse.Namespace) -> int:
    """A Hugging Face folder to torch_dist or mp_rank."""
    from megatron_spice.convert.find import open_source

    source = _cast(open_source(options.source, options.hf), options.dtype)
    asked = {"command": options.command, "format": options.format, "dtype": options.dtype}
    degrees = [getattr(options, f"{degree}_parallel_size") for degree in DEGREES]
    if options.format == "mp_rank":
        from megatron_spice.convert.mp_rank_layout import make_layout
        from megatron_spice.convert.mp_rank_target import MpRankTarget

        degrees[2] = _virtual_stages(options, source.architecture.num_layers)
        layout = make_layout(source.architecture, *degrees)
        target = MpRankTarget(source, layout, options.transformer_impl)
        return _convert(options, source, target, {**asked, "layout": degrees, "transformer_impl": options.transformer_impl})
    if max(degrees) > 1:
        raise ValueError("torch_dist is free of any layout: parallel sizes are for --format mp_rank; leave them out")
    from megatron_spice.convert.torch_dist_target import TorchDistTarget

    return _convert(options, source, TorchDistTarget(source), asked)


def _virtual_stages(options: argparse.Namespace, num_layers: int) -> int:
    each = options.num_layers_per_virtual_pipeline_stage
    if each is None:
        return options.virtual_pipeline_parallel_size
    if options.virtual_pipeline_parallel_size > 1:
        raise ValueError("give --virtual-pipeline-parallel-size or --num-layers-per-virtual-pipeline-stage, not both")
    stages, rest = divmod(num_layers, options.pipeline_parallel_size * each)
    if rest:
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage={each} x --pipeline-parallel-size={options.pipeline_parallel_size} does not divide "
            f"the model's num_hidden_layers={num_layers}; change one of them"
        )
    return stages


def to_hf(options: argparse.Namespace) -> int:
    """Any checkpoint to a Hugging Face folder."""
    from megatron_spice.config.engine_weights import NO_SCALES
    from megatron_spice.convert.find import open_source
    from megatron_spice.convert.hf_target import HFTarget

    source = _cast(open_source(options.source, options.hf), "bfloat16" if options.dtype == "fp8" else options.dtype)
    if options.dtype == "fp8" and source.architecture.family in NO_SCALES:
        print(f"convert_checkpoint: SGLang cannot load block-FP8 weights of {source.architecture.family} models, vLLM can", file=sys.stderr)
    target = HFTarget(source, options.dtype == "fp8", options.shard_size)
    asked = {"command": options.command, "dtype": options.dtype, "shard_size": options.shard_size}
    return _convert(options, source, target, asked)


def _cast(source: Any, dtype: str | None) -> Any:
    import torch

    from megatron_spice.convert.source import Cast

    return source if dtype is None else Cast(source, getattr(torch, dtype))


def _convert(options: argparse.Namespace, source: Any, target: Any, asked: dict[str, Any]) -> int:
    from megatron_spice.convert.job import convert

    started = time.perf_counter()
    num_bytes = convert(source, target, options.target, asked, options.processes, options.command)
    seconds = time.perf_counter() - started
    print(f"{options.target}: {num_bytes / 1e9:.2f} GB written in {seconds:.2f} s ({num_bytes / 1e9 / seconds:.2f} GB/s)")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """What a checkpoint holds."""
    from megatron_spice.convert import inspect
    from megatron_spice.convert.find import open_source

    for line in inspect.lines(open_source(options.folder, options.hf), options.tensors):
        print(line)
    return 0


def compare_two(options: argparse.Namespace) -> int:
    """0 if all tensors have the same bits, 1 with the differences if not."""
    from megatron_spice.convert.compare import differences
    from megatron_spice.convert.find import open_source

    one, other = (open_source(folder, options.hf) for folder in (options.one, options.other))
    count = 0
    for count, difference in enumerate(differences(one, other), 1):  # noqa: B007
        print(difference)
    print(f"{count} differences" if count else f"the same bits in all {sum(len(entry.hf) for entry in one.entries)} tensors")
    return 1 if count else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _bytes(text: str) -> int:
    """`5GB`, `500MB` (powers of ten, as Hugging Face counts), `5GiB`, or plain bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())

#!/usr/bin/env python3
"""Turn texts into a corpus: memory-mapped token shards (Megatron's .bin/.idx), a passage table and a manifest.

    python tools/preprocess_corpus.py texts.jsonl more/ --tokenizer models/smollm2 --output corpora/texts
    python tools/preprocess_corpus.py inspect|verify|merge ...      (corpora that are there: corpus_commands.py)

Inputs are JSON lines with a `text` (and optionally a `source`), Parquet, Arrow, plain text, all but Parquet and Arrow also
compressed, folders and patterns of them. A corpus is bound to its tokenizer: use the folder of the model that will be trained.

All cores work. A run that was interrupted goes on when the same command is given again: what it had finished is in a folder
beside the output. When the corpus is there, the same command does nothing, as long as the inputs' paths, sizes and modification
times are the same.
Exit codes: 0 done or already there, 1 could not be written or was interrupted, 2 wrong arguments or inputs.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import corpus_commands  # noqa: E402

from megatron_spice.corpus.build import Request, build_corpus, same_request  # noqa: E402
from megatron_spice.corpus.build_display import Display  # noqa: E402
from megatron_spice.corpus.build_options import BuildOptions  # noqa: E402
from megatron_spice.corpus.encoder_check import BACKENDS, choose_encoder  # noqa: E402
from megatron_spice.corpus.inputs import find_inputs  # noqa: E402
from megatron_spice.corpus.manifest import FILE_NAME, Manifest  # noqa: E402
from megatron_spice.corpus.parts import first_texts  # noqa: E402
from megatron_spice.corpus.stages import NotAllJudged  # noqa: E402
from megatron_spice.corpus.stages.arguments import add_stage_arguments, stage_options  # noqa: E402
from megatron_spice.corpus.tokenizer import TextTokenizer  # noqa: E402
from megatron_spice.corpus.units import ReadOptions  # noqa: E402
from megatron_spice.corpus.workers import usable_cores  # noqa: E402
from megatron_spice.corpus.workspace import finished_parts, has_work, workspace_path  # noqa: E402


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    defaults, reading = BuildOptions(), ReadOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder, data set folder, or pattern")
    add("--tokenizer", required=True, metavar="HF_DIR", help="model folder with tokenizer.json")
    add("--output", required=True, type=Path, metavar="DIR", help="corpus folder to make")
    add("--max-tokens", type=int, default=defaults.max_tokens, help="longest passage [%(default)s]")
    add("--min-tokens", type=int, default=defaults.min_tokens, help="shortest passage; less is left out [%(default)s]")
    add("--source", action="append", default=[], metavar="NAME",
        help="label of the texts, instead of their own `source` or file name; once, or once an input")  # fmt: skip
    add("--text-key", default=reading.text_key, help="JSON key or column of the text [%(default)s]")
    add("--source-key", default=reading.source_key, help="JSON key or column of the source label [%(default)s]")
    add("--shard-tokens", type=int, default=defaults.shard_tokens, help="most tokens of a shard [%(default)s]")
    add("--strict", action="store_true", help="end at the first broken line instead of leaving it out")
    add("--workers", type=_positive, default=usable_cores(), help="processes [%(default)s, the usable cores]")
    add("--tokenizer-backend", choices=BACKENDS, default="auto",
        help="auto: gigatoken if it gives the Hugging Face tokenizer's ids on a sample, else that [%(default)s]")  # fmt: skip
    add("--task", type=_task, metavar="I/N",
        help="make only the I-th (from 0) of N runs of the inputs, in DIR.tasks/I: one machine's share, to be merged")  # fmt: skip
    add("--restart", action="store_true", help="throw away what an interrupted run has left")
    add("--verify", action="store_true", help="then read everything back against its checksums")
    add_stage_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in corpus_commands.COMMANDS:
        return corpus_commands.main(arguments)
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is half done goes
    output = args.output
    if args.task:
        output = output.with_name(f"{output.name}.tasks") / f"{args.task[0]:05d}"
    try:
        request = Request(
            find_inputs(args.inputs, args.source), TextTokenizer.from_dir(args.tokenizer), output,
            BuildOptions(args.max_tokens, args.min_tokens, args.shard_tokens),
            ReadOptions(args.text_key, args.source_key), args.task, stage_options(args),
        )  # fmt: skip
        code = already_there(request, args.strict) if (output / FILE_NAME).is_file() else build(request, args, arguments)
        return corpus_commands.verify([output]) if args.verify and code == 0 else code
    except NotAllJudged as others:
        print(f"{output}: {others}; give the same command again when all tasks have been here, to make the corpus")
        return 0
    except (ValueError, FileNotFoundError) as error:
        return complain(error, output, 2)
    except (OSError, RuntimeError) as error:  # a lost worker among them
        return complain(error, output, 1)
    except (KeyboardInterrupt, SystemExit) as ending:
        complain("interrupted", output, 1)
        return ending.code if isinstance(ending, SystemExit) else 128 + signal.SIGINT


def build(request: Request, args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Make the corpus and say what it is."""
    encoder, warning = choose_encoder(request.tokenizer, args.tokenizer_backend, first_texts(request.inputs, request.reading))
    if warning:
        print(f"preprocess_corpus: {warning}", file=sys.stderr)
    began = time.perf_counter()
    with Display() as display:
        manifest = build_corpus(
            request, encoder=encoder, workers=args.workers, command=["tools/preprocess_corpus.py", *arguments],
            on_progress=display.show, on_bad_line=display.bad_line, on_step=display.step, say=display.say,
            strict=args.strict, restart=args.restart,
        )  # fmt: skip
    print(summary(manifest, request.output, display.text_bytes, time.perf_counter() - began))
    return 0


def already_there(request: Request, strict: bool) -> int:
    """Say that the corpus exists; an error when it is not the one that is asked for, or not whole."""
    output, manifest = request.output, Manifest.read(request.output)
    different = same_request(manifest, request)
    if different:
        raise ValueError(
            f"{output} is a corpus made with different {' and '.join(different)} "
            f"(by: {shlex.join(manifest.command)}); delete it or give another --output"
        )
    if strict and manifest.skipped.get("bad_lines"):
        raise ValueError(f"{output} was made without {manifest.skipped['bad_lines']} broken lines, see its bad_lines.txt")
    manifest.check_files(output)
    print(f"{output} is already there: {manifest.passages:,} passages of {manifest.documents:,} documents")
    return 0


def summary(manifest: Manifest, output: Path, text_bytes: int, seconds: float) -> str:
    lines = [
        f"{output}: {manifest.passages:,} passages of {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.shards} shard{'s' * (manifest.shards != 1)} of {manifest.dtype}; "
        f"{text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s"
    ]
    if manifest.skipped:
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.skipped.items())
        lines.append(f"without passage: {reasons}")
    return "\n".join(lines)


def complain(what: object, output: Path, code: int) -> int:
    """Say what was wrong and what is left of the work; the exit code."""
    workspace = workspace_path(output)
    kept = finished_parts(workspace)
    left = f"; {kept} finished parts are kept, the same command goes on with them" if kept else ""
    if has_work(workspace) and not kept:
        left = "; what its stages have found is kept, the same command goes on with it"
    print(f"preprocess_corpus: {what}; there is no {output} yet{left}" if code == 1 else f"preprocess_corpus: {what}", file=sys.stderr)
    return code


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _task(text: str) -> tuple[int, int]:
    number, slash, tasks = text.partition("/")
    if not (slash and number.isdigit() and tasks.isdigit() and int(number) < int(tasks)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1, such as 3/64")
    return int(number), int(tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Turn texts into a corpus: memory-mapped token shards (Megatron's .bin/.idx), a passage table and a manifest.

    python tools/preprocess_corpus.py texts.jsonl more/ --tokenizer models/smollm2 --output corpora/texts

Inputs are JSON lines with a `text` (and optionally a `source`), plain text files, folders and patterns of them. A
corpus is bound to its tokenizer: use the folder of the model that will be trained. Running the same command again does
nothing, as long as the inputs' paths, sizes and modification times are the same.
Exit codes: 0 done or already there, 1 could not be written, 2 wrong arguments or inputs.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.corpus.build import BuildOptions, BuildProgress, build_corpus, same_request  # noqa: E402
from megatron_spice.corpus.inputs import InputFile, find_inputs  # noqa: E402
from megatron_spice.corpus.manifest import FILE_NAME, Manifest  # noqa: E402
from megatron_spice.corpus.tokenizer import TextTokenizer  # noqa: E402

BAD_LINES_SHOWN = 20


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    defaults = BuildOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".jsonl[.gz], .txt[.gz], .md, .rst, folder, pattern")
    parser.add_argument("--tokenizer", required=True, metavar="HF_DIR", help="model folder with tokenizer.json")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="corpus folder to make")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="longest passage [%(default)s]")
    parser.add_argument(
        "--min-tokens", type=int, default=defaults.min_tokens, help="shortest passage; less is left out [%(default)s]"
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME",
        help="label of the texts, instead of their own `source` or file name; once, or once an input",
    )  # fmt: skip
    parser.add_argument(
        "--shard-tokens", type=int, default=defaults.shard_tokens, help="most tokens of a shard [%(default)s]"
    )
    parser.add_argument("--strict", action="store_true", help="end at the first broken line instead of leaving it out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the partial output goes
    try:
        options = BuildOptions(args.max_tokens, args.min_tokens, args.shard_tokens)
        tokenizer = TextTokenizer.from_dir(args.tokenizer)
        inputs = find_inputs(args.inputs, args.source)
        if (args.output / FILE_NAME).is_file():
            return already_there(args.output, inputs, tokenizer, options)
        began = time.perf_counter()
        command = ["tools/preprocess_corpus.py", *arguments]
        with Display(sum(file.path.stat().st_size for file in inputs)) as display:
            manifest = build_corpus(
                inputs, tokenizer, args.output, options,
                command=command, on_progress=display.show, on_bad_line=display.bad_line, strict=args.strict,
            )  # fmt: skip
        print(summary(manifest, args.output, display.text_bytes, time.perf_counter() - began))
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"preprocess_corpus: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"preprocess_corpus: {error}; nothing was written to {args.output}", file=sys.stderr)
        return 1


def already_there(
    output: Path, inputs: Sequence[InputFile], tokenizer: TextTokenizer, options: BuildOptions
) -> int:
    """Say that the corpus exists; an error when it is not the one that is asked for, or not whole."""
    manifest = Manifest.read(output)
    different = same_request(manifest, inputs, tokenizer, options)
    if different:
        raise ValueError(
            f"{output} is a corpus made with different {' and '.join(different)} "
            f"(by: {shlex.join(manifest.command)}); delete it or give another --output"
        )
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


class Display:
    """A progress bar over the input files' bytes, and the first broken lines, on stderr."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
        self._bad_lines = 0
        self.text_bytes = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._bad_lines > BAD_LINES_SHOWN:
            print(f"... and {self._bad_lines - BAD_LINES_SHOWN} more broken lines", file=sys.stderr)

    def show(self, progress: BuildProgress) -> None:
        self.text_bytes = progress.text_bytes
        text = f"{progress.documents:,} documents, {progress.tokens / 1e6:,.1f}M tokens"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(progress.disk_bytes - self._bar.n)

    def bad_line(self, message: str) -> None:
        self._bad_lines += 1
        if self._bad_lines <= BAD_LINES_SHOWN:
            self._bar.write(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What tools/preprocess_corpus.py does with corpora that are there: look into them, read them back, join them.

    python tools/preprocess_corpus.py inspect DIR [--passages N --tokenizer HF_DIR --seed S]
    python tools/preprocess_corpus.py verify DIR...
    python tools/preprocess_corpus.py merge OUTPUT DIR...

(To make a corpus of an input called `merge`, write ./merge.)
Exit codes: 0 done, 1 a corpus is damaged or the merged one could not be written, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.describe import counted, describe, describe_passage, visible
from megatron_spice.corpus.merge import merge
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.verify import expected_files, verify_corpus
from megatron_spice.corpus.workers import usable_cores


def main(arguments: Sequence[str]) -> int:
    """Runs a command; its exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any text can be printed, also where the locale is C
            stream.reconfigure(errors="backslashreplace")
    try:
        return options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"preprocess_corpus: {visible(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `inspect DIR | head`: nobody wants more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"preprocess_corpus: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def verify(folders: Sequence[Path]) -> int:
    """Read corpora back, with a progress bar; 1 when a file is damaged, each of which is named."""
    code = 0
    for folder in folders:
        try:
            files = expected_files(folder)
        except ValueError as error:  # the manifest or the shard table themselves
            print(f"preprocess_corpus: {visible(str(error))}", file=sys.stderr)
            code = 1
            continue
        size = sum(file.bytes for file in files)
        lock, problems = threading.Lock(), 0
        with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
            for problem in verify_corpus(folder, workers=usable_cores(), on_bytes=_locked(bar.update, lock)):
                problems += 1
                tqdm.write(f"preprocess_corpus: {visible(problem)}", file=sys.stderr)
        if problems:
            print(f"{visible(str(folder))}: {problems:,} of {counted(len(files), 'file')} damaged")
            code = 1
        else:
            print(f"{visible(str(folder))}: {counted(len(files), 'file')}, {size / 1e6:,.1f} MB, all as they were written")
    return code


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="preprocess_corpus.py", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("inspect", help="shards, sources, lengths, random passages").add_argument
    add("folder", type=Path, metavar="DIR")
    add("--passages", type=int, default=0, metavar="N", help="show N passages as text; needs --tokenizer")
    add("--tokenizer", metavar="HF_DIR", help="the model folder that the corpus was made with")
    add("--seed", type=int, default=0, help="which: the first that train.seed would draw uniformly [%(default)s]")
    commands.choices["inspect"].set_defaults(run=_inspect)
    add = commands.add_parser("verify", help="read everything back against its checksums").add_argument
    add("folders", type=Path, nargs="+", metavar="DIR")
    commands.choices["verify"].set_defaults(run=lambda options: verify(options.folders))
    add = commands.add_parser("merge", help="one corpus of several, without copying them").add_argument
    add("output", type=Path, metavar="OUTPUT")
    add("corpora", type=Path, nargs="+", metavar="DIR", help="tasks of one request, or corpora of different inputs")
    commands.choices["merge"].set_defaults(run=_merge)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    if options.passages and not options.tokenizer:
        raise ValueError("--passages shows text, which needs --tokenizer HF_DIR, the folder that the corpus was made with")
    for line in describe(options.folder):
        print(line)
    if options.passages:
        corpus = Corpus(options.folder, TextTokenizer.from_dir(options.tokenizer))
        for passage in PassageSampler(corpus, options.seed).next(options.passages):
            print("", *describe_passage(passage), sep="\n")
    return 0


def _merge(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is half done goes
    command = ["tools/preprocess_corpus.py", "merge", str(options.output), *map(str, options.corpora)]
    merged = merge(options.output, options.corpora, command)
    print(
        f"{visible(str(options.output))}: {merged.passages:,} passages of {merged.documents:,} documents, "
        f"{merged.tokens:,} tokens, {counted(merged.shards, 'shard')} left where made, in {counted(len(merged.folders), 'folder')}"
    )
    return 0


def _locked(call: Callable[[int], object], lock: threading.Lock) -> Callable[[int], None]:
    """`call` for several threads: a bar's count is not safe by itself."""

    def locked(count: int) -> None:
        with lock:
            call(count)

    return locked


COMMANDS = ("inspect", "verify", "merge")

"""The stages' flags on a command line."""

from __future__ import annotations

import argparse

from megatron_spice.corpus.stages.options import DEDUP, FILTERS, StageOptions


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = StageOptions()
    add = parser.add_argument_group("stages that leave documents out (see removed.jsonl.gz in the output)").add_argument
    add("--filter", type=_names, action="extend", default=[], metavar="NAME,...",
        help=f"quality: {', '.join(FILTERS)}")  # fmt: skip
    add("--language", type=_names, action="extend", default=[], metavar="CODE,...",
        help="keep documents in one of these languages, such as en,de")  # fmt: skip
    add("--language-threshold", type=float, default=defaults.language_threshold, metavar="P",
        help="at least as sure as this [%(default)s]")  # fmt: skip
    add("--decontaminate", nargs="+", action="extend", default=[], metavar="FILE_OR_DIR",
        help="benchmarks (JSON, JSON lines, Parquet, data set folders, lines of text) not to train on")  # fmt: skip
    add("--ngram", type=int, default=defaults.ngram, metavar="N",
        help="words in a row shared with a benchmark's item that are too many [%(default)s]")  # fmt: skip
    add("--dedup", choices=DEDUP, help="leave out documents with the same text, or (minhash) nearly the same")


def stage_options(args: argparse.Namespace) -> StageOptions:
    return StageOptions(
        filters=tuple(args.filter),
        languages=tuple(args.language),
        language_threshold=args.language_threshold,
        decontaminate=tuple(args.decontaminate),
        ngram=args.ngram,
        dedup=args.dedup,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]

"""What a corpus holds, as lines for people: totals, shards, sources, how long passages are, and some of them as text.

Everything but the texts comes from the tables, block by block, so it takes no time and no tokenizer. Labels, paths and
texts are whatever someone has put into a corpus: nothing of them reaches a terminal that could move its cursor or hide
what follows.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import PASSAGES_NAME, Manifest
from megatron_spice.corpus.passages import open_passages
from megatron_spice.corpus.shard_files import ShardFiles
from megatron_spice.game.records import Passage

_SHOWN = 20  # shards, sources, folders
_BINS, _BAR = 12, 40
_BLOCK = 1 << 18  # rows


def describe(folder: Path) -> Iterator[str]:
    """Lines about the corpus in `folder`.

    Raises:
        FileNotFoundError, ValueError: there is no corpus, or its manifest or tables are damaged.
    """
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    shards = ShardFiles(folder, manifest)
    yield (
        f"{visible(str(folder))}: {manifest.passages:,} passages of {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens of {manifest.dtype}"
    )
    yield f"tokenizer   {manifest.tokenizer['hash'][:12]}, a vocabulary of {manifest.tokenizer['vocab_size']:,}"
    yield f"options     {visible(', '.join(f'{name} {value}' for name, value in manifest.options.items() if value))}"
    yield f"inputs      {_inputs(manifest)}"
    if manifest.skipped:
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.skipped.items())
        yield f"left out    {visible(reasons)}"
    yield f"made by     {visible(shlex.join(manifest.command))}"
    yield ""
    yield from _shards(shards, manifest)
    yield ""
    yield from _sources(manifest)
    yield ""
    yield from _lengths(folder, manifest)


def describe_passage(passage: Passage) -> Iterator[str]:
    """Lines with a passage's text; each is marked, so that none can be taken for one of ours."""
    yield (
        f"passage {passage.index:,}: document {passage.document:,}, source {visible(passage.source)}, "
        f"{len(passage.token_ids):,} tokens"
    )
    for line in passage.text.split("\n"):
        yield f"  | {visible(line)}"


def visible(text: str) -> str:
    """Text without anything that a terminal would obey or not show: such characters are spelled out, as \\x1b."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def counted(number: int, noun: str) -> str:
    """Such as `1 shard` and `1,024 shards`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _inputs(manifest: Manifest) -> str:
    size = sum(entry.get("bytes", 0) for entry in manifest.inputs)
    part = f", task {manifest.task[0]} of {manifest.task[1]}" if manifest.task else ""
    return f"{counted(len(manifest.inputs), 'file')}, {size / 1e6:,.1f} MB{part}"


def _shards(shards: ShardFiles, manifest: Manifest) -> Iterator[str]:
    places = "" if manifest.folders == [""] else f" in {counted(len(manifest.folders), 'folder')}"
    rows = [("shard", "documents", "tokens", "MB")]
    for number in range(min(len(shards), _SHOWN)):
        (name, size, _), _ = shards.files(number)
        row = shards.table[number]
        rows.append((visible(name), f"{row['documents']:,}", f"{row['tokens']:,}", f"{size / 1e6:,.1f}"))
    yield f"{counted(len(shards), 'shard')}{places}"
    yield from _columns(rows)
    if len(shards) > _SHOWN:
        tokens = shards.table["tokens"]
        yield f"... and {len(shards) - _SHOWN:,} more; tokens: least {tokens.min():,}, most {tokens.max():,}"


def _sources(manifest: Manifest) -> Iterator[str]:
    rows = [("source", "documents", "tokens", "passages", "share of passages")]
    largest = sorted(manifest.sources, key=lambda source: -source["passages"])
    for source in largest[:_SHOWN]:
        counts = [f"{source[name]:,}" for name in ("documents", "tokens", "passages")]
        rows.append((visible(source["name"]), *counts, f"{source['passages'] / max(manifest.passages, 1):.1%}"))
    yield counted(len(manifest.sources), "source")
    yield from _columns(rows)
    if len(largest) > _SHOWN:
        yield f"... and {len(largest) - _SHOWN:,} smaller ones"


def _lengths(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A histogram of the passages' tokens; its last bin ends with the longest passage there may be."""
    table = open_passages(folder / PASSAGES_NAME)
    longest = max((int(table["length"][begin : begin + _BLOCK].max()) for begin in range(0, len(table), _BLOCK)), default=0)
    width = max(-(-longest // _BINS), 1)
    counts = np.zeros(_BINS, dtype=np.int64)
    for begin in range(0, len(table), _BLOCK):
        lengths = table["length"][begin : begin + _BLOCK].astype(np.int64)
        counts += np.bincount(np.maximum(lengths - 1, 0) // width, minlength=_BINS)
    yield f"passages by tokens (longest {longest:,})"
    for place, count in enumerate(counts.tolist()):
        if place * width < longest:
            bar = "#" * -(-count * _BAR // max(int(counts.max()), 1))
            yield f"  {place * width + 1:>8,} to {min((place + 1) * width, longest):<8,} {count:>12,}  {bar}".rstrip()


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows of cells, the first of them titles: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        yield "  ".join(["", first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]).rstrip()

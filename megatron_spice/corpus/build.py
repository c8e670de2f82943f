"""Makes a corpus folder: documents in, shards, passage table and manifest out, streaming.

The folder is written beside its place under another name and moved there when it is whole, so whoever sees it sees all
of it. Reading, encoding (on all cores, inside the tokenizer) and writing go block by block.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_spice.corpus.combine import MOST_SOURCES, Piece, combine
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, passage_checksums
from megatron_spice.corpus.segment import cut
from megatron_spice.corpus.shard_table import SHARD_DTYPE, shard_prefix, write_shards
from megatron_spice.corpus.shards import ShardWriter, ids_dtype
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.units import read_unit, split_into_units

BLOCK_BYTES = 4 << 20
BLOCK_DOCUMENTS = 4096
UNIT_BYTES = 64 << 20


class BadInput(ValueError):
    """A broken line under --strict, or inputs that give no corpus."""


@dataclass(frozen=True)
class BuildOptions:
    """How passages are cut and shards are closed; all in tokens."""

    max_tokens: int = 5992
    min_tokens: int = 32
    shard_tokens: int = 1 << 30

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"--min-tokens {self.min_tokens} and --max-tokens {self.max_tokens}: "
                "the first must be at least 1 and at most the second"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens {self.shard_tokens} must be at least 1")


@dataclass
class BuildProgress:
    """What a build has done so far. `disk_bytes` is how much of the input files is read, `text_bytes` what it held."""

    disk_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    passages: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def build_corpus(
    inputs: Sequence[InputFile],
    tokenizer: TextTokenizer,
    output: Path,
    options: BuildOptions,
    *,
    command: Sequence[str] = (),
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
    on_bad_line: Callable[[str], None] = lambda message: None,
    strict: bool = False,
) -> Manifest:
    """Write the corpus of the input files into `output`, which must not exist or be empty.

    `on_progress` is called after each block, `on_bad_line` with `FILE:LINE: reason` for each line left out.

    Raises:
        BadInput: no passage came out, or (strict) a line is broken. Nothing is left behind, nor after any other error.
    """
    if output.exists() and any(output.iterdir()):
        raise BadInput(f"{output} is not empty; delete it or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    part, whole = partial / "part_00000", partial / "corpus"
    for folder in (partial, part, whole):
        folder.mkdir()
    progress = BuildProgress()
    try:
        identities = [file.identity() for file in inputs]
        with _PartWriter(part, tokenizer, options, progress) as writer:
            for block in _blocks(inputs, progress, on_bad_line, strict):
                writer.add(block)
                on_progress(progress)
            if progress.passages == 0:
                raise BadInput(_why_empty(len(inputs), progress, options))
            writer.finish(identities, list(command)).write(part)
        manifest = dataclasses.replace(combine(whole, [Piece.read(part)], adopt=True), command=list(command))
        manifest.write(whole)
        os.rename(whole, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def same_request(
    manifest: Manifest, inputs: Sequence[InputFile], tokenizer: TextTokenizer, options: BuildOptions
) -> list[str]:
    """In what an existing corpus differs from what is asked for; nothing: it is the same."""
    wanted = {
        "tokenizer": (manifest.tokenizer["hash"], tokenizer.vocab_hash),
        "options": (manifest.options, vars(options)),
        "inputs": (manifest.inputs, [file.identity() for file in inputs]),
    }
    return [name for name, (have, want) in wanted.items() if have != want]


def _blocks(
    inputs: Sequence[InputFile], progress: BuildProgress, on_bad_line: Callable[[str], None], strict: bool
) -> Iterator[list[tuple[str, str]]]:
    """(text, source label) of all inputs in blocks of bounded size."""
    block: list[tuple[str, str]] = []
    size = done = 0

    def bad(path: str, line: int, reason: str) -> None:
        message = f"{path}:{line}: {reason}"
        if strict:
            raise BadInput(message)
        progress.skipped["bad_lines"] += 1
        on_bad_line(message)

    for unit in split_into_units(inputs, UNIT_BYTES):
        documents = read_unit(unit, bad)
        for document in documents:
            if not document.text.strip():
                progress.skipped["empty_documents"] += 1
                continue
            block.append((document.text, document.source))
            size += len(document.text)
            if size >= BLOCK_BYTES or len(block) >= BLOCK_DOCUMENTS:
                progress.disk_bytes = done + documents.disk_bytes
                yield block
                block, size = [], 0
        done += unit.disk_bytes
    progress.disk_bytes = done
    yield block


class _PartWriter:
    """Shards, tables and counts of a part being made, numbered for themselves."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer, options: BuildOptions, progress: BuildProgress):
        self._folder, self._tokenizer, self._options, self._progress = folder, tokenizer, options, progress
        self._dtype = ids_dtype(tokenizer.vocab_size)
        self._table = PassageWriter(folder / PASSAGES_NAME)
        self._shard: ShardWriter | None = None
        self._shards: list[np.ndarray] = []
        self._sources: dict[str, dict] = {}
        self._source_ids: dict[str, int] = {}

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._table.abandon()
        if self._shard is not None:
            self._shard.abandon()

    def add(self, block: list[tuple[str, str]]) -> None:
        """Encode and write a block of (text, source label)."""
        progress = self._progress
        for (text, label), ids in zip(block, self._tokenizer.encode_batch([text for text, _ in block])):
            source = self._source(label)
            rows = self._segments(ids)
            progress.skipped["short_documents"] += not rows
            progress.text_bytes += len(text.encode())
            progress.documents += 1
            progress.tokens += len(ids)
            progress.passages += len(rows)
            source["documents"] += 1
            source["tokens"] += len(ids)
            source["passages"] += len(rows)
            shard = self._open_shard(len(ids))
            start, array = shard.tokens, np.array(ids, dtype=self._dtype)
            document = shard.add(array)
            checksums = passage_checksums(array, *zip(*rows), start) if rows else []
            table = [
                (len(self._shards), document, start + offset, length, self._source_ids[label], checksum)
                for (offset, length), checksum in zip(rows, checksums)
            ]
            self._table.add(np.array(table, dtype=PASSAGE_DTYPE))

    def finish(self, inputs: list[dict], command: list[str]) -> Manifest:
        """Close all files; the manifest of what they hold."""
        self._close_shard()
        shards = np.concatenate([np.empty(0, SHARD_DTYPE), *self._shards])
        files = {PASSAGES_NAME: self._table.close(), SHARDS_NAME: write_shards(self._folder / SHARDS_NAME, shards)}
        progress = self._progress
        return Manifest(
            tokenizer={"hash": self._tokenizer.vocab_hash, "vocab_size": self._tokenizer.vocab_size},
            dtype=self._dtype.name,
            documents=progress.documents,
            tokens=progress.tokens,
            passages=progress.passages,
            options=vars(self._options),
            sources=list(self._sources.values()),
            shards=len(shards),
            files=files,
            inputs=inputs,
            skipped={reason: count for reason, count in progress.skipped.items() if count},
            command=command,
        )

    def _segments(self, ids: list[int]) -> list[tuple[int, int]]:
        options = self._options
        if len(ids) <= options.max_tokens:
            return [(0, len(ids))] if len(ids) >= options.min_tokens else []
        text, starts = self._tokenizer.to_bytes(ids)
        return cut(text, starts, options.max_tokens, options.min_tokens)

    def _source(self, label: str) -> dict:
        if label not in self._sources:
            if len(self._sources) >= MOST_SOURCES:
                raise BadInput(
                    f"more than {MOST_SOURCES} different `source` labels; they are meant for kinds of text, "
                    "not for single documents: give --source NAME to replace them"
                )
            self._source_ids[label] = len(self._sources)
            self._sources[label] = {"name": label, "documents": 0, "tokens": 0, "passages": 0}
        return self._sources[label]

    def _open_shard(self, length: int) -> ShardWriter:
        """The shard that takes a document of this length: a new one when the open one would grow past its limit."""
        if self._shard is not None and self._shard.tokens + length > self._options.shard_tokens:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardWriter(shard_prefix(self._folder, len(self._shards)), self._dtype)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close().row(len(self._shards)))
            self._shard = None


def _why_empty(files: int, progress: BuildProgress, options: BuildOptions) -> str:
    return (
        f"no passage in {files} input file{'s' * (files != 1)}: {progress.documents} documents, of them "
        f"{progress.skipped['short_documents']} under --min-tokens {options.min_tokens}; "
        f"{progress.skipped['empty_documents']} empty, {progress.skipped['bad_lines']} broken lines"
    )

"""Several corpora become one by their tables: no token is read or written, shard files stay where they are.

Either the tasks of one request (`--task I/N` on several machines): all of them, in their order, give the corpus that one run
over the same inputs would have given. Or corpora of different inputs, made with the same tokenizer and options, in the order
given. The merged folder holds tables and a manifest; where the shards are, it says by paths relative to itself, so it goes on
working where the same folders are moved or mounted together, and not without them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_spice.corpus import bad_lines, removed
from megatron_spice.corpus.build import join_records
from megatron_spice.corpus.combine import Piece, combine
from megatron_spice.corpus.manifest import FILE_NAME, Manifest
from megatron_spice.corpus.shard_files import ShardFiles


def merge(output: Path, corpora: Sequence[Path], command: Sequence[str] = ()) -> Manifest:
    """Write the corpus of all `corpora` into `output`, whole or not at all.

    When it is there already, made of the same, nothing is done.

    Returns:
        Its manifest.

    Raises:
        FileNotFoundError: one of the corpora is not there.
        ValueError: they do not belong together, a task is missing, a file is damaged, or `output` is in the way.
    """
    pieces = [Piece.read(path) for path in corpora]
    for piece in pieces:
        _check_apart(output, piece.path)
    pieces, inputs = _of_one_request(pieces) if any(piece.manifest.task for piece in pieces) else _of_many(pieces)
    for piece in pieces:
        shards = ShardFiles(piece.path, piece.manifest)
        for shard in range(len(shards)):
            shards.check(shard)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.merging-{os.getpid()}")
    partial.mkdir()
    try:
        merged = combine(partial, pieces, adopt=False)
        merged = dataclasses.replace(merged, inputs=inputs, command=list(command))
        if merged.passages == 0:
            raise ValueError(f"no passage in {len(pieces)} corpora; make them with a lower --min-tokens or more text")
        if output.exists() and any(output.iterdir()):
            return _already_there(output, merged)
        for name in (bad_lines.FILE_NAME, removed.FILE_NAME):
            join_records(partial, [piece.path for piece in pieces], name)
        merged.write(partial)
        try:
            os.rename(partial, output)
        except OSError:
            if not (output / FILE_NAME).is_file():
                raise
            return _already_there(output, merged)  # of two that merge at once, the other was first
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merged


def _check_apart(output: Path, corpus: Path) -> None:
    """A merged corpus inside one of its own would be moved, or deleted, with it."""
    here, there = output.resolve(), corpus.resolve()
    if here == there or there in here.parents:
        raise ValueError(f"{output} is {corpus} or inside it; give an output beside the corpora")


def _of_one_request(pieces: list[Piece]) -> tuple[list[Piece], list[dict]]:
    """All the tasks of a request in their order, and its inputs."""
    first = next(piece for piece in pieces if piece.manifest.task)
    count, by_number = first.manifest.task[1], dict[int, Piece]()
    for piece in pieces:
        if not piece.manifest.task:
            raise ValueError(f"{piece.path} is a whole corpus, {first.path} one task of several; merge the tasks first")
        number, tasks = piece.manifest.task
        if tasks != count or piece.manifest.inputs != first.manifest.inputs:
            raise ValueError(f"{first.path} and {piece.path} are tasks of different requests: other inputs or another number")
        if number in by_number:
            raise ValueError(f"{by_number[number].path} and {piece.path} are the same task, {number} of {tasks}")
        by_number[number] = piece
    missing = [str(number) for number in range(count) if number not in by_number]
    if missing:
        shown = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        raise ValueError(f"of {count} tasks {len(missing)} are missing: {shown}; run them with --task I/{count}")
    return [by_number[number] for number in range(count)], first.manifest.inputs


def _of_many(pieces: list[Piece]) -> tuple[list[Piece], list[dict]]:
    """Corpora of different inputs in the order given, and all their inputs."""
    seen: dict[str, Piece] = {}
    for piece in pieces:
        for entry in piece.manifest.inputs:
            if (other := seen.setdefault(entry["path"], piece)) is not piece:
                raise ValueError(f"{other.path} and {piece.path} both hold {entry['path']}; its texts would count twice")
    return pieces, [entry for piece in pieces for entry in piece.manifest.inputs]


def _already_there(output: Path, wanted: Manifest) -> Manifest:
    """The corpus in `output`, which must be what is wanted."""
    if not (output / FILE_NAME).is_file():
        raise ValueError(f"{output} is not empty; delete it or give another output")
    found = Manifest.read(output)
    if dataclasses.replace(found, command=wanted.command) != wanted:
        raise ValueError(f"{output} is another corpus; delete it or give another output")
    return found

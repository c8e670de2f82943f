"""Several pieces become one corpus: their tables are joined, their tokens are never read.

A piece is a folder with shards, a shard table, a passage table and a manifest. The parts of a running build are pieces
whose shard files move into the new corpus (`adopt`); finished corpora that are merged are pieces whose shard files stay
where they are, and the new shard table says where. Either way passages get new shard numbers and source ids, in bounded
memory.

Joining ends with the source table: the passages' numbers grouped by source, which the weighted sampler draws from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, SOURCES_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, open_passages
from megatron_spice.corpus.shard_table import SHARD_DTYPE, open_shards, shard_prefix, write_shards
from megatron_spice.corpus.table_file import TableWriter, open_table

SOURCES_DTYPE = np.dtype("<u8")
MOST_SOURCES = 1 << 16
_BLOCK = 1 << 18  # rows


@dataclass(frozen=True)
class Piece:
    """A folder with shards and tables, described by its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: Path) -> Piece:
        """A piece with its manifest as it lies in the folder; raises what `Manifest.read` does."""
        return cls(path, Manifest.read(path))


def combine(output: Path, pieces: Sequence[Piece], *, adopt: bool) -> Manifest:
    """Write the tables of all pieces, in their order, into `output` (an existing folder).

    Args:
        adopt: rename the pieces' shard files into `output`. When this was interrupted, the same call goes on with it.

    Returns:
        The manifest, not written yet; `inputs` and `skipped` are those of the pieces together, `command` is empty.

    Raises:
        ValueError: the pieces do not fit together, have too many sources, or one of their tables is missing or damaged.
    """
    _check_alike(pieces)
    sources = _joined_sources(pieces)
    ids = {source["name"]: number for number, source in enumerate(sources)}
    folders: dict[str, int] = {"": 0} if adopt else {}
    table = PassageWriter(output / PASSAGES_NAME)
    shards: list[np.ndarray] = []
    try:
        base = 0
        for piece in pieces:
            piece.manifest.check_files(piece.path)
            rows = open_shards(piece.path / SHARDS_NAME)
            renamed = np.array([ids[source["name"]] for source in piece.manifest.sources], dtype=np.uint32)
            for block in _blocks(open_passages(piece.path / PASSAGES_NAME)):
                _check_within(piece, block)
                block["shard"] += base
                block["source"] = renamed[block["source"]]
                table.add(block)
            shards.append(_adopt(output, piece, rows, base) if adopt else _leave(output, piece, rows, folders))
            base += len(rows)
        files = {PASSAGES_NAME: table.close()}
    finally:
        table.abandon()
    files[SHARDS_NAME] = write_shards(output / SHARDS_NAME, np.concatenate(shards))
    files[SOURCES_NAME] = write_sources(output, [source["passages"] for source in sources])
    first, counted = pieces[0].manifest, [piece.manifest for piece in pieces]
    return Manifest(
        tokenizer=first.tokenizer,
        dtype=first.dtype,
        documents=sum(each.documents for each in counted),
        tokens=sum(each.tokens for each in counted),
        passages=sum(each.passages for each in counted),
        shards=base,
        options=first.options,
        sources=sources,
        files=files,
        folders=list(folders),
        inputs=[entry for each in counted for entry in each.inputs],
        skipped=dict(sum((Counter(each.skipped) for each in counted), Counter())),
    )


def write_sources(folder: Path, passages: Sequence[int]) -> dict:
    """Write the source table of the passage table in `folder`: passage numbers grouped by source, ascending in each.

    Args:
        passages: of each source.

    Returns:
        The file's size and checksum as the manifest keeps them.
    """
    place = np.cumsum([0, *passages])[:-1].tolist()
    writer = TableWriter(folder / SOURCES_NAME, SOURCES_DTYPE)
    try:
        begin = 0
        for block in _blocks(open_passages(folder / PASSAGES_NAME)):
            order = np.argsort(block["source"], kind="stable")
            found, starts = np.unique(block["source"][order], return_index=True)
            for source, numbers in zip(found.tolist(), np.split(order, starts[1:])):
                writer.put(place[source], (numbers + begin).astype(SOURCES_DTYPE))
                place[source] += len(numbers)
            begin += len(block)
        assert len(writer) == sum(passages) and place == np.cumsum(passages).tolist()
        return writer.close()
    finally:
        writer.abandon()


def open_sources(path: str | os.PathLike[str]) -> np.ndarray:
    """The source table as a read-only memory map, u64 [passages]; ValueError when it is none or cut short."""
    return open_table(path, SOURCES_DTYPE, "source table")


def _blocks(table: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in copies of bounded size."""
    for begin in range(0, len(table), _BLOCK):
        yield table[begin : begin + _BLOCK].copy()


def _check_alike(pieces: Sequence[Piece]) -> None:
    first = pieces[0]
    for piece in pieces[1:]:
        for name in ("tokenizer", "dtype", "options"):
            here, there = getattr(first.manifest, name), getattr(piece.manifest, name)
            if here != there:
                raise ValueError(
                    f"{first.path} and {piece.path} were made with different {name}: {here} and {there}; "
                    "make one of them again"
                )


def _check_within(piece: Piece, rows: np.ndarray) -> None:
    manifest = piece.manifest
    if len(rows) and (rows["shard"].max() >= manifest.shards or rows["source"].max() >= len(manifest.sources)):
        raise ValueError(f"{piece.path}: {PASSAGES_NAME} names shards or sources that are not there; it is damaged")


def _joined_sources(pieces: Sequence[Piece]) -> list[dict]:
    """Counts by label, labels in the order in which they first come."""
    joined: dict[str, Counter[str]] = {}
    for piece in pieces:
        for source in piece.manifest.sources:
            counts = {key: value for key, value in source.items() if key != "name"}
            joined.setdefault(source["name"], Counter(documents=0, tokens=0, passages=0)).update(counts)
    if len(joined) > MOST_SOURCES:
        raise ValueError(
            f"more than {MOST_SOURCES} different `source` labels; they are meant for kinds of text, not for single "
            "documents: give --source NAME to replace them"
        )
    return [{"name": name, **counts} for name, counts in joined.items()]


def _adopt(output: Path, piece: Piece, rows: np.ndarray, base: int) -> np.ndarray:
    """Rename a piece's shard files into `output`, numbered from `base`; their rows there."""
    assert piece.manifest.folders == [""], "only a piece with shards of its own can be adopted"
    rows = rows.copy()
    for place, number in enumerate(rows["number"].tolist()):
        for suffix in (".bin", ".idx"):
            source, target = shard_prefix(piece.path, number) + suffix, shard_prefix(output, base + place) + suffix
            if os.path.exists(source) or not os.path.exists(target):  # not there any more: an interrupted call has renamed it
                os.rename(source, target)
    rows["folder"] = 0
    rows["number"] = np.arange(base, base + len(rows))
    return rows


def _leave(output: Path, piece: Piece, rows: np.ndarray, folders: dict[str, int]) -> np.ndarray:
    """A piece's rows with its folders as seen from `output`, entered in `folders`."""
    places = []
    for folder in piece.manifest.folders:
        seen = Path(os.path.relpath((piece.path / folder).resolve(), output.resolve())).as_posix()
        places.append(folders.setdefault("" if seen == "." else seen, len(folders)))
    rows = rows.copy()
    rows["folder"] = np.array(places, dtype=np.uint32)[rows["folder"]]
    return rows

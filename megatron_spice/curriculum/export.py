"""A run's curriculum as a Parquet file: written in batches to a name beside, which takes the file's name when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spice.curriculum.rows import COLUMNS, Run, rows

BATCH = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows are exported. An attempt that was not answered has no pass rate, and passes no limit of it.

    `without`: names of flags, or "duplicate", none of which a row may have.
    """

    valid_only: bool = False
    reasoner_tasks: bool = False
    min_pass: float | None = None
    max_pass: float | None = None
    min_agreement: float | None = None
    without: tuple[str, ...] = ()

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row is wanted."""
        if (self.valid_only and not row["valid"]) or (self.reasoner_tasks and not row["is_reasoner_task"]):
            return False
        raised = {*row["flags"], *(["duplicate"] if row["duplicate"] else [])}
        return not raised.intersection(self.without) and all(
            limit is None or (row[name] is not None and (row[name] >= limit if is_least else row[name] <= limit))
            for name, limit, is_least in (
                ("pass_rate", self.min_pass, True),
                ("pass_rate", self.max_pass, False),
                ("agreement", self.min_agreement, True),
            )
        )


def export(run: Run, target: Path, wanted: Wanted, memory: int = 100_000) -> tuple[int, int]:
    """Writes the rows that are wanted.

    Returns:
        Rows written, and attempts there were.

    Raises:
        ValueError: `target` is there already; a line of the log is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if target.exists():
        raise ValueError(f"{target} exists; remove it or name another file")
    types = {
        "string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_(), "double": pa.float64(),
        "list<string>": pa.list_(pa.string()), "list<bool>": pa.list_(pa.bool_()),
    }  # fmt: skip
    about = {"recipe_hash": run.recipe_hash, "model": run.model, "run": run.folder.name, "wanted": asdict(wanted)}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()], metadata={"curriculum": json.dumps(about)})
    partial = target.with_name(f"{target.name}.partial")
    counts = {"written": 0, "seen": 0}
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for batch in _batches(_counted(rows(run, memory), wanted, counts)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return counts["written"], counts["seen"]


def _counted(found: Iterable[dict[str, Any]], wanted: Wanted, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    for row in found:
        counts["seen"] += 1
        if wanted.has(row):
            counts["written"] += 1
            yield row


def _batches(found: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in found:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

"""Documents with exactly the same text: 128-bit hashes, sorted. The first in the order of the inputs is kept.

datatrove's exact deduplication keeps any of them and cannot say which; this is as short. A range of hashes is compared
at a time, over all units, so memory is bounded by the range: about 256 MiB.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from megatron_spice.corpus.stages.records import DUPLICATE_DTYPE

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
_RANGE_ROWS = 2 << 20


def write_hashes(texts: Iterable[str], unit: int, folder: Path) -> None:
    """Of the unit's documents, in order; an empty text has none and is nobody's duplicate."""
    hashes = [
        (*divmod(xxhash.xxh3_128_intdigest(text.encode()), 1 << 64), number)
        for number, text in enumerate(texts)
        if text
    ]
    found = np.array(hashes, dtype=HASH_DTYPE)
    found.sort(order=["high", "low", "document"])
    (folder / "hashes").mkdir(exist_ok=True)
    np.save(folder / "hashes" / f"{unit:06d}.npy", found)


def find_duplicates(units: int, folder: Path, range_rows: int = _RANGE_ROWS) -> Iterator[np.ndarray]:
    """The duplicates, DUPLICATE_DTYPE, one range of hashes after the other."""
    if not units:
        return
    paths = [folder / "hashes" / f"{unit:06d}.npy" for unit in range(units)]
    total = sum(len(np.load(path, mmap_mode="r")) for path in paths)
    ranges = 1 + total // range_rows
    edges = [min((1 << 64) * place // ranges, (1 << 64) - 1) for place in range(ranges + 1)]
    for low, high in zip(edges, edges[1:]):
        found = [_between(path, low, high, last=high == edges[-1]) for path in paths]
        rows = np.concatenate(found)
        unit = np.repeat(np.arange(units, dtype="<u4"), [len(part) for part in found])
        order = np.lexsort((rows["document"], unit, rows["low"], rows["high"]))
        rows, unit = rows[order], unit[order]
        new = np.ones(len(rows), bool)
        new[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
        first = np.flatnonzero(new)[np.cumsum(new) - 1] if len(rows) else np.empty(0, np.int64)
        duplicates = np.empty(int((~new).sum()), DUPLICATE_DTYPE)
        duplicates["unit"], duplicates["document"] = unit[~new], rows["document"][~new]
        duplicates["kept_unit"], duplicates["kept_document"] = unit[first[~new]], rows["document"][first[~new]]
        yield duplicates


def _between(path: Path, low: int, high: int, last: bool) -> np.ndarray:
    rows = np.load(path, mmap_mode="r")
    start = bisect_left(rows["high"], low)  # a few reads of the file, where searchsorted would copy the column
    stop = len(rows) if last else bisect_left(rows["high"], high)
    return np.array(rows[start:stop])

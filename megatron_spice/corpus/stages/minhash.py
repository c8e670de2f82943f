"""Near duplicates by datatrove's MinHash: 14 buckets of 8 hashes of the documents' 5-grams (similarity about 0.72 up).

Its signature, bucket and cluster steps as they are, but for two things: n-grams are hashed block by block (datatrove
holds 900 bytes a word at once), to the same signatures, and words come from the tokenizer that needs no download.
Memory: a bucket is merged from the units' sorted files; clustering holds every document that has a duplicate.
"""

from __future__ import annotations

import contextlib
import io
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from loguru import logger

from megatron_spice.corpus.stages.records import DUPLICATE_DTYPE
from megatron_spice.corpus.stages.words import TOKENIZER, hashed_ngrams

logger.disable("datatrove")  # each step of each unit would be announced

CONFIG = MinhashConfig()
BUCKETS = CONFIG.num_buckets
_PRIME = np.uint64((1 << 61) - 1)
_BLOCK = 256  # n-grams whose 112 hashes are worked on at once: small enough for the core's own cache


class _Signatures(MinhashDedupSignature):
    def get_shingles(self, text: str) -> np.ndarray:
        blocks = [hashes for _, hashes in hashed_ngrams(text, self.config.n_grams)]
        return np.concatenate(blocks).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        factors, summands = self.parameters
        smallest = np.full(self.num_hashes, _PRIME)
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK] * factors
            block += summands
            block %= _PRIME
            np.minimum(smallest, block.min(axis=0), out=smallest)
        return smallest.reshape(self.config.num_buckets, -1).tolist()


def write_signatures(texts: Iterable[str], unit: int, folder: Path) -> None:
    """Of the unit's documents, in order; an empty text has none and is nobody's duplicate."""
    step = _Signatures(str(folder / "signatures"), CONFIG, TOKENIZER)
    step.run((Document(text, "") for text in texts), rank=unit)


def match_bucket(bucket: int, units: int, folder: Path) -> None:
    """Find the pairs of documents that agree in a bucket. All units' files are open at once."""
    allow_open_files(units + 64)
    MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=CONFIG, lines_to_buffer=60).run(
        rank=bucket, world_size=BUCKETS
    )


def cluster(folder: Path) -> Iterator[np.ndarray]:
    """The duplicates, DUPLICATE_DTYPE, unit by unit; one document of each cluster is kept and not among them."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        MinhashDedupCluster(
            str(folder / "pairs"), str(folder / "clusters"), CONFIG, save_cluster_id=True, lines_to_buffer=4096
        ).run()
    members = {int(path.stem): np.fromfile(path, "<u4").reshape(-1, 2) for path in _files(folder, ".clusters")}
    kept = np.zeros((1 + max((found[:, 1].max() for found in members.values()), default=-1), 2), "<u4")
    removed = {int(path.stem): np.fromfile(path, "<u4") for path in _files(folder, ".remove")}
    for unit, found in members.items():
        stays = found[~np.isin(found[:, 0], removed.get(unit, ()))]
        kept[stays[:, 1], 0], kept[stays[:, 1], 1] = unit, stays[:, 0]
    for unit, found in sorted(members.items()):
        goes = found[np.isin(found[:, 0], removed.get(unit, ()))]
        duplicates = np.empty(len(goes), DUPLICATE_DTYPE)
        duplicates["unit"], duplicates["document"] = unit, goes[:, 0]
        duplicates["kept_unit"], duplicates["kept_document"] = kept[goes[:, 1]].T
        yield duplicates


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted((folder / "clusters").glob(f"*{suffix}"))


def allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and count > hard:
        raise ValueError(f"--dedup minhash opens {count} files at once and {hard} are allowed: raise it by ulimit -Hn")
    if count > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

"""`tools/benchmark.py passages`: random passages out of a corpus, against Megatron's IndexedDataset on the same shard.

A corpus of random ids is written to a temporary folder and read from the page cache, passage by passage in random order, ids as
numpy. Ours verifies each passage by its checksum, Megatron's checks nothing; the ceiling is a slice of a plain map. All take
turns, medians and their spread are told. `as they are` is the call alone, after which Megatron's bytes have not been touched
yet; `used` copies the ids to int64, as a model or a decoder would. Then: how long a corpus of many shards takes to open (its
tables are real, its shards absent), and both loaders by passages a second, and by how long a consumer that has other work for
20 ms between its batches waits for them when the shards must come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_options import columns, positive, refuse, several

from megatron_spice import machine
from megatron_spice.corpus.combine import Piece, combine
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.manifest import PASSAGES_NAME, SHARDS_NAME, Manifest
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, passage_checksums
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.shard_files import CHECKED_AT_OPEN
from megatron_spice.corpus.shard_table import SHARD_DTYPE, shard_prefix, write_shards
from megatron_spice.corpus.shards import ShardWriter

HELP = "random passages, against Megatron's IndexedDataset"
BATCH, BATCHES, BUSY = 32, 40, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--tokens", type=several, default=[512, 5992], metavar="N[,N...]", help="of a passage")
    parser.add_argument("--megabytes", type=positive, default=400, help="size of the corpus (default 400)")
    parser.add_argument("--reads", type=positive, default=50_000, help="passages read a turn (default 50,000)")
    parser.add_argument("--shards", type=positive, default=100_000, help="of the corpus that is only opened")
    parser.add_argument("--steps", type=positive, default=9, help="turns (default 9)")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each length of passages, and one for many shards."""
    if options.shards <= CHECKED_AT_OPEN:
        refuse(f"--shards {options.shards}: of up to {CHECKED_AT_OPEN} shards the files are looked at, and these have none")
    same = {"ranks": 1, "threads": 1, "seed": options.seed, "steps": options.steps}
    lengths = [
        {**same, "title": f"{tokens} tokens", "tokens": tokens, "megabytes": options.megabytes, "reads": options.reads}
        for tokens in options.tokens
    ]
    return [*lengths, {**same, "title": f"{options.shards:,} shards", "shards": options.shards}]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Million reads a second, ratios to Megatron's, and the rest as lines."""
    rows = [("passages", "ours M/s", "Megatron M/s", "ceiling M/s", "ours / Megatron", "spread")]
    lines = []
    for result in results:
        if "open_seconds" in result:
            lines.append(f"{result['shards']:,} shards: opened, first passage read in {result['open_seconds'] * 1000:.0f} ms")
            continue
        for how, found in result["reads"].items():
            rate = {name: result["count"] / statistics.median(times) / 1e6 for name, times in found.items()}
            ratios = sorted(theirs / ours for ours, theirs in zip(found["ours"], found["megatron"]))
            cells = [f"{rate[name]:.2f}" for name in ("ours", "megatron", "ceiling")]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append((f"{result['tokens']:,} tokens, {how}", *cells, f"{statistics.median(ratios):.2f}", spread))
        for loader, found in result["loaders"].items():
            lines.append(
                f"{result['tokens']:,} tokens, {loader}: {found['passages_per_second']:,.0f} passages/s; a busy consumer waits "
                f"{found['waits']:.1f} ms a batch of {BATCH} (worst {found['worst_wait']:.0f}) for shards from the disk"
            )
    return "\n".join([columns(rows), *lines])


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job in this process and writes the result as JSON."""
    with tempfile.TemporaryDirectory(prefix="spice-passages-") as name:
        measured = _many_shards(job, Path(name)) if "shards" in job else _one_length(job, Path(name))
    result.write_text(json.dumps(measured))


class _NoText:
    """As much of a tokenizer as reading ids needs."""

    vocab_hash = "random ids"

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return ""


def _one_length(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    tokens = job["tokens"]
    corpus_dir = _write_corpus(folder, job["megabytes"] * 1_000_000 // (2 * tokens), tokens, job["seed"])
    return {"tokens": tokens, "count": job["reads"], "reads": _reads(corpus_dir, job), "loaders": _loaders(corpus_dir, job)}


def _reads(corpus_dir: Path, job: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each turn, by what is done with the ids and by reader."""
    corpus = Corpus(corpus_dir, _NoText())
    order = random.Random(job["seed"]).choices(range(len(corpus)), k=job["reads"])
    readers = _readers(corpus_dir, corpus, job["tokens"])
    reads: dict[str, dict[str, list[float]]] = {}
    for how, use in (("as they are", None), ("used", lambda ids: ids.astype(np.int64))):
        reads[how] = {name: [] for name in readers}
        for step in range(job["steps"] + 1):
            for name, read in readers.items():
                seconds = _timed(read, use, order)
                if step:  # the first turn brings the shard into memory
                    reads[how][name].append(seconds)
    return reads


def _readers(corpus_dir: Path, corpus: Corpus, tokens: int) -> dict[str, Callable[[int], np.ndarray]]:
    """The three ways to the ids of a passage."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = shard_prefix(corpus_dir, 0)
    plain = np.asarray(np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r"))
    return {
        "ours": corpus.token_ids,
        "megatron": IndexedDataset(prefix).get,
        "ceiling": lambda index: plain[index * tokens : (index + 1) * tokens],
    }


def _timed(read: Callable[[int], np.ndarray], use: Callable[[np.ndarray], Any] | None, order: list[int]) -> float:
    start = time.perf_counter()
    if use is None:
        for index in order:
            read(index)
    else:
        for index in order:
            use(read(index))
    return time.perf_counter() - start


def _loaders(corpus_dir: Path, job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Both loaders, each on a corpus that it opens itself; only ours where DALI is not installed."""
    makers: dict[str, Callable[[Corpus], Any]] = {"mmap": lambda corpus: PassageSampler(corpus, job["seed"])}
    if machine.version("nvidia-dali-cuda130"):
        from megatron_spice.corpus.dali_loader import DaliSampler

        makers["dali"] = lambda corpus: DaliSampler(corpus, job["seed"], batch_size=BATCH)
    found = {}
    for name, make in makers.items():
        warm = _batch_seconds(make(Corpus(corpus_dir, _NoText())), busy=0.0)
        _drop_from_memory(Path(shard_prefix(corpus_dir, 0) + ".bin"))
        cold = _batch_seconds(make(Corpus(corpus_dir, _NoText())), busy=BUSY)
        found[name] = {
            "passages_per_second": BATCH / statistics.mean(warm), "waits": 1000 * statistics.mean(cold),
            "worst_wait": 1000 * max(cold),
        }  # fmt: skip
    return found


def _batch_seconds(sampler: Any, busy: float) -> list[float]:
    """Seconds that each batch takes, after the first; its taker has other work for `busy` seconds between them."""
    seconds = []
    for _ in range(BATCHES + 1):
        time.sleep(busy)
        start = time.perf_counter()
        sampler.next(BATCH)
        seconds.append(time.perf_counter() - start)
    if hasattr(sampler, "close"):
        sampler.close()
    return seconds[1:]


def _drop_from_memory(path: Path) -> None:
    """Asks the kernel to forget the file, so that the next reads come from the disk; nobody may have it mapped."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _many_shards(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A corpus of so many shards with a passage each, of which only the last is there."""
    shards = job["shards"]
    passages, rows = np.zeros(shards, PASSAGE_DTYPE), np.zeros(shards, SHARD_DTYPE)
    passages["shard"], passages["length"] = np.arange(shards), 1000
    passages["checksum"] = passage_checksums(np.zeros(1000, np.uint16), [0], [1000], 0)[0]
    rows["number"], rows["documents"], rows["tokens"] = np.arange(shards), 1, 1000
    _describe(folder, passages, rows)
    for suffix, size in ((".bin", 2000), (".idx", 62)):
        with open(shard_prefix(folder, shards - 1) + suffix, "wb") as file:
            file.truncate(size)
    seconds = []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        Corpus(folder, _NoText()).passage(shards - 1)
        seconds.append(time.perf_counter() - start)
    return {"shards": shards, "open_seconds": statistics.median(seconds), "all_seconds": seconds}


def _write_corpus(folder: Path, count: int, tokens: int, seed: int) -> Path:
    """A corpus of `count` documents of so many random ids, each a passage, in one shard."""
    part, whole = folder / "part", folder / "corpus"
    part.mkdir()
    whole.mkdir()
    ids = np.random.default_rng(seed).integers(0, 49152, count * tokens, dtype=np.uint16)
    writer = ShardWriter(shard_prefix(part, 0), ids.dtype)
    writer.add_many(ids, [tokens] * count)
    passages = np.zeros(count, PASSAGE_DTYPE)
    passages["document"], passages["length"] = np.arange(count), tokens
    passages["start"] = np.arange(count) * tokens
    passages["checksum"] = passage_checksums(ids, passages["start"].tolist(), [tokens] * count, 0)
    piece = Piece(part, _describe(part, passages, writer.close().row(0)))
    combine(whole, [piece], adopt=True).write(whole)
    return whole


def _describe(folder: Path, passages: np.ndarray, shards: np.ndarray) -> Manifest:
    """Write the tables and a manifest of a corpus with one source."""
    writer = PassageWriter(folder / PASSAGES_NAME)
    writer.add(passages)
    totals = {"documents": int(shards["documents"].sum()), "tokens": int(shards["tokens"].sum()), "passages": len(passages)}
    manifest = Manifest(
        tokenizer={"hash": _NoText.vocab_hash, "vocab_size": 49152}, dtype="uint16", shards=len(shards), options={},
        sources=[{"name": "random", **totals}], **totals,
        files={PASSAGES_NAME: writer.close(), SHARDS_NAME: write_shards(folder / SHARDS_NAME, shards)},
    )  # fmt: skip
    manifest.write(folder)
    return manifest

"""A document that shares n words in a row with a benchmark's item is left out.

As datatrove's NGramsDecontFilter: texts are simplified (lower case, no signs, numbers become 0), cut into words, and
the hashes of their n-grams compared; what differs is that question and answer are looked for as one text, that a hit
names the item, and that long documents are searched in pieces. (Its indexer needs lighteval and lighteval's tasks.)
The index is two sorted arrays on disk, mapped by all workers: 12 bytes an n-gram, whoever uses it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_spice.corpus.stages.benchmarks import benchmark_files, read_items
from megatron_spice.corpus.stages.options import Removal
from megatron_spice.corpus.stages.words import hashed_ngrams, hashes_of, normalized_words

FOLDER = "benchmarks"
ORIGIN_DTYPE = np.dtype([("file", "<u4"), ("item", "<u4")])


def build_index(arguments: Sequence[str], ngram: int, folder: Path, say: Callable[[str], None]) -> None:
    """Write the index of the benchmarks into `folder / FOLDER`, whole or not at all. Does nothing where there is one.

    Raises:
        ValueError: a benchmark cannot be read, or has no item that is long enough.
    """
    if (folder / FOLDER).is_dir():
        return
    files = benchmark_files(arguments)
    hashes, origins = [np.empty(0, np.uint64)], [np.empty(0, ORIGIN_DTYPE)]
    for number, path in enumerate(files):
        items = short = 0
        for item, text in read_items(path):
            found = hashes_of(normalized_words(text), ngram)
            items += 1
            short += not len(found)
            hashes.append(found)
            origins.append(np.full(len(found), np.array((number, item), ORIGIN_DTYPE)))
        if short == items:
            raise ValueError(f"--decontaminate: none of the {items} items of {path} has {ngram} words; lower --ngram")
        if short:
            say(f"--decontaminate: {short} of the {items} items of {path} have under {ngram} words: not looked for")
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder))
    np.save(partial / "hashes.npy", unique)
    np.save(partial / "origins.npy", np.concatenate(origins)[first])
    (partial / "files.json").write_text(json.dumps([str(path) for path in files]))
    try:
        os.rename(partial, folder / FOLDER)
    except OSError:
        shutil.rmtree(partial)
        if not (folder / FOLDER).is_dir():  # and not that another task has made the same meanwhile
            raise


def contamination_judge(folder: Path, ngram: int) -> Callable[[str], Removal | None]:
    """Judges texts by the index that `build_index` made in the folder."""
    index = np.load(folder / FOLDER / "hashes.npy", mmap_mode="r")
    origins = np.load(folder / FOLDER / "origins.npy", mmap_mode="r")
    files = json.loads((folder / FOLDER / "files.json").read_text())

    def judge(text: str) -> Removal | None:
        for words, hashes in hashed_ngrams(text, ngram):
            places = np.minimum(np.searchsorted(index, hashes), len(index) - 1)
            hits = np.flatnonzero(index[places] == hashes)
            if len(hits):
                origin = origins[places[hits[0]]]
                shared = " ".join(words[hits[0] : hits[0] + ngram])
                return Removal("contaminated", f"{files[origin['file']]}:{origin['item']} has: {shared}")
        return None

    return judge

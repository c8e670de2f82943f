"""`tools/benchmark.py passages` in small: it runs, its readers read the same, and its table says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import passages_benchmark as suite  # noqa: E402

from megatron_spice.corpus.corpus import Corpus  # noqa: E402


def test_it_runs_and_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, "tools/benchmark.py", "passages", "--tokens", "64", "--megabytes", "1", "--reads", "200"]
    command += ["--shards", "5000", "--steps", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "passages.json").read_text())["results"]
    assert {name: len(times) for name, times in first["reads"]["used"].items()} == {"ours": 2, "megatron": 2, "ceiling": 2}
    assert first["loaders"]["mmap"]["passages_per_second"] > 0 and second["shards"] == 5000
    text = (tmp_path / "passages.txt").read_text()
    assert text in done.stdout and "64 tokens, as they are" in text and "5,000 shards: opened" in text


def test_all_readers_give_the_same_ids(tmp_path: Path) -> None:
    folder = suite._write_corpus(tmp_path, count=9, tokens=7, seed=1)
    readers = suite._readers(folder, Corpus(folder, suite._NoText()), tokens=7)
    for index in range(9):
        ours, megatron, ceiling = (read(index) for read in readers.values())
        assert len(ours) == 7 and np.array_equal(ours, megatron) and np.array_equal(ours, ceiling)


def test_the_table_tells_ratios_of_turns() -> None:
    reads = {"used": {"ours": [1.0, 2.0, 1.0], "megatron": [2.0, 2.0, 3.0], "ceiling": [0.5, 0.5, 0.5]}}
    loaders = {"mmap": {"passages_per_second": 1234.4, "waits": 0.5, "worst_wait": 2.0}}
    many = {"shards": 100_000, "open_seconds": 0.0123}
    lines = suite.table([{"tokens": 5992, "count": 1_000_000, "reads": reads, "loaders": loaders}, many]).splitlines()
    assert lines[1].split() == ["5,992", "tokens,", "used", "1.00", "0.50", "2.00", "2.00", "1.00", "to", "3.00"]
    assert "1,234 passages/s" in lines[2] and lines[3].endswith("in 12 ms")

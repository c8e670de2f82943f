"""The parts of the converter's benchmark on a small model, and options that do not fit."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from hf_folders import read_tensors

from megatron_spice.convert.find import open_source

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BENCHMARK = [sys.executable, str(TOOLS / "benchmark.py"), "convert"]


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("convert_benchmark")


def test_what_it_makes_copies_and_converts_and_says_of_it(suite, tmp_path):
    num_bytes, largest = suite._make_model(tmp_path / "hf", 0.03, seed=0)
    tensors = read_tensors(tmp_path / "hf")
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(0.03e9, rel=0.1)
    assert largest == max(tensor.nbytes for tensor in tensors.values())
    copied = suite._copy(tmp_path / "hf", tmp_path / "copy")
    assert copied > 0 and not (tmp_path / "copy").exists()
    whole, inside, memory = suite._convert(["hf-to-megatron", tmp_path / "hf", tmp_path / "out", "--processes", 1], watched=True)
    assert whole > inside > 0 and memory > 10e6, "Python and torch alone have more"
    assert open_source(tmp_path / "out").architecture == open_source(tmp_path / "hf").architecture
    said = suite.table([{
        "gigabytes": 3.0, "processes": 2, "rounds": 3, "largest_tensor": 1e8, "largest_file": 1e9,
        "seconds": {"copy": [2.0, 1.0, 9.0], "one way": [3.0, 4.0, 5.0]}, "start": {"one way": [1.0]}, "memory": {"one way": [2e8]},
    }])  # fmt: skip
    assert said.splitlines()[-1].split() == ["one", "way", "4.00", "0.75", "2.00", "1.00", "200", "2.00", "0.20"]


@pytest.mark.parametrize("arguments, named", [(["--gigabytes", "0"], "0.0 is no size"), (["--gigabytes", "100000000"], "has not the room")])
def test_bad_options_are_named(arguments, named):
    done = subprocess.run([*BENCHMARK, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr

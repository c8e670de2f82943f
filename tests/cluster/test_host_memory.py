from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_spice.cluster import host_memory

PROGRAM = """
import json, os, resource, statistics
from megatron_spice.cluster import host_memory
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = resident()
faults_of_a_block()
# Something small may once be cut from the freed block, and the next one is then a new one; but not again and again.
faults = statistics.median(faults_of_a_block() for _ in range(10))
held = resident()
host_memory.give_back_freed_memory()
print(json.dumps([faults, held - before, held - resident()]))
"""
BLOCK = 4 * 2**26


def measured(**environment: str) -> list[int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(host_memory._glibc() is None, reason="this C library is not glibc")
def test_freed_memory_is_kept_once_for_the_next_block_and_given_back_when_asked():
    faults, held, given_back = measured(GLIBC_TUNABLES=host_memory.TUNABLES)
    assert faults < 100
    assert BLOCK < held < 2.5 * BLOCK
    assert given_back > 0.9 * BLOCK


@pytest.mark.skipif(host_memory._glibc() is None, reason="this C library is not glibc")
def test_without_the_tunables_every_block_is_asked_for_anew():
    faults, held, _ = measured(GLIBC_TUNABLES="")
    assert faults > 100 and held < BLOCK

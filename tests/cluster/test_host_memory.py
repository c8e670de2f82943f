from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_spice.cluster import host_memory

PROGRAM = """
import json, os, resource, sys
from megatron_spice.cluster import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed_memory()
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_block()
faults = faults_of_a_block()
held = resident()
host_memory.give_back_freed_memory()
print(json.dumps([faults, held, resident()]))
"""


def measured(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(host_memory._glibc() is None, reason="this C library has no mallopt")
def test_freed_memory_is_kept_for_the_next_block_and_given_back_when_asked():
    size = 4 * 2**26
    faults, held, after = measured("keep")
    assert faults < 100
    assert held - after > 0.9 * size


@pytest.mark.skipif(host_memory._glibc() is None, reason="this C library has no mallopt")
def test_what_is_kept_is_what_malloc_would_have_let_go():
    assert measured("leave")[0] > 100

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_spice.rollout import leftovers

SERVER = """
import mmap, os, sys, time
for name in sys.argv[1:]:
    with open(name, "w+b") as file:
        file.truncate(4096)
        globals()[name] = mmap.mmap(file.fileno(), 4096)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def names() -> Iterator[list[Path]]:
    pid = os.getpid()
    paths = [leftovers.SHARED_MEMORY / name for name in (f"sgl_shm_mq_{pid}_test", f"sglang_loads_test_{pid}.shm", f"torch_{pid}_test")]
    yield paths
    for path in paths:
        path.unlink(missing_ok=True)


@pytest.mark.skipif(not leftovers.SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_what_a_killed_server_had_mapped_is_removed_and_nothing_else(names: list[Path]) -> None:
    command = [sys.executable, "-c", SERVER, *map(str, names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            mine, of_others = leftovers.named_memory(server.pid), leftovers.named_memory(os.getpgid(0))
        finally:
            server.kill()
    assert mine == set(names[:2]) and not mine & of_others
    leftovers.remove(mine)
    leftovers.remove(mine)  # already gone: no error
    assert [path.exists() for path in names] == [False, False, True], "a bucket's memory is the sender's to remove"

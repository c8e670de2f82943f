"""When the server forks what SGLang would spawn. (That it does is seen at running servers: `processes.assert_forked`.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COUNT = """
import multiprocessing, threading
from megatron_spice.rollout.sglang_server import forking, prepare_cpu_process

def launch(say):
    return say, multiprocessing.get_start_method()

multiprocessing.set_start_method("spawn")
print(*forking(launch, "alone"), multiprocessing.get_start_method())
try:
    forking(lambda: 1 / 0)
except ZeroDivisionError:
    print(multiprocessing.get_start_method())
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
print(*forking(launch, say="beside"), multiprocessing.get_start_method())
done.set()
other.join()
prepare_cpu_process(4)
import numpy, torch
print(*forking(launch, "after imports"))
"""


def test_only_a_process_without_other_threads_forks_and_only_then() -> None:
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", COUNT], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:2] == ["alone fork spawn", "spawn"]
    assert "2 threads already" in said[2] and said[3:] == ["beside spawn spawn", "after imports fork"]

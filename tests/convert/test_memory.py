"""A process has the memory of a few tensors, however many the model has; mapped files are the system's to keep or not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from hf_folders import read_tensors, write_model

ROOT = Path(__file__).resolve().parents[2]

FEW = 6  # tensors: what is read, what it becomes, and what the allocator keeps of the ones before
SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 8000,
}  # fmt: skip


def _anonymous(pid: int) -> int:
    """Bytes of a process that are nobody's file."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        return next((1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon")), 0)
    return 0


def _workers() -> list[psutil.Process]:
    """The processes that the children of this one have started."""
    with contextlib.suppress(psutil.Error):
        return [worker for child in psutil.Process().children() for worker in child.children()]
    return []


class _Peak:
    """The largest growth of a worker, looked at every millisecond."""

    def __enter__(self) -> _Peak:
        self.growth, self.seen, self._over = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        first: dict[int, int] = {}
        while not self._over.is_set():
            for child in _workers():
                now = _anonymous(child.pid)
                if now:
                    self.growth = max(self.growth, now - first.setdefault(child.pid, now))
                    self.seen += 1
            time.sleep(0.001)


CONVERSIONS = """
import sys
from pathlib import Path
from conversions import to_hf, to_mp_rank, to_torch_dist
hf, out = map(Path, sys.argv[1:])
to_hf(to_torch_dist(hf, out / "dist"), out / "one")
to_hf(to_mp_rank(hf, out / "ranks", tensor=2), out / "other", hf=hf)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """In a process of its own: the tests' has memory to spare from before, which would hide what is taken."""
    model = write_model(tmp_path / "hf", "llama", shards=2, **SIZES)
    tensors = read_tensors(model)
    largest, whole = max(tensor.nbytes for tensor in tensors.values()), sum(tensor.nbytes for tensor in tensors.values())
    assert whole > 20 * largest
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    with _Peak() as peak:
        command = [sys.executable, "-c", CONVERSIONS, str(model), str(tmp_path)]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": paths})
    assert peak.seen > 20 and 0 < peak.growth < FEW * largest

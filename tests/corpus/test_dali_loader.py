"""DALI's loader is the sampler by another way: same passages, same order, same state, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_corpus import Document, HasHash, make_corpus

pytest.importorskip("nvidia.dali", reason="DALI is not installed (requirements/dali-no-deps.txt)")

from megatron_spice.corpus.corpus import Corpus  # noqa: E402
from megatron_spice.corpus.dali_loader import DaliSampler  # noqa: E402
from megatron_spice.corpus.sampler import PassageSampler  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    documents = [Document("abc"[n % 3], list(range(n, 2 * n + 1))) for n in range(40)]
    return Corpus(make_corpus(tmp_path / "corpus", documents, longest=9), HasHash())


def dali(corpus: Corpus, *arguments: Any) -> Any:
    return closing(DaliSampler(corpus, *arguments, batch_size=5))


@pytest.mark.parametrize("weights", [None, {"a": 0.25, "c": 0.75}])
def test_passages_order_and_state_are_the_sampler_s(corpus: Corpus, weights: dict[str, float] | None) -> None:
    plain = PassageSampler(corpus, 3, weights)
    with dali(corpus, 3, weights) as sampler:
        for count in (2, 0, 7, 1, 5, 12):
            assert sampler.next(count) == plain.next(count)
            assert sampler.state_dict() == plain.state_dict()


def test_the_cursor_counts_what_was_handed_out(corpus: Corpus) -> None:
    """Whoever resumes whom, in the middle of a batch that was read ahead."""
    plain = PassageSampler(corpus, 4)
    whole = plain.next(20)
    with dali(corpus, 4) as first, dali(corpus, 4) as second:
        first.next(7)
        second.load_state_dict(first.state_dict())
        assert second.next(6) == whole[7:13]
        plain.load_state_dict(second.state_dict())
        assert plain.next(7) == whole[13:]
        second.load_state_dict(first.state_dict())  # back, with batches read ahead
        assert second.next(3) == whole[7:10]
        with pytest.raises(ValueError, match="has seed 5, this run's has 4"):
            second.load_state_dict({**first.state_dict(), "seed": 5})


def test_a_batch_is_padded_and_says_its_lengths(corpus: Corpus) -> None:
    plain = PassageSampler(corpus, 5)
    with closing(DaliSampler(corpus, 5, batch_size=5, pad_id=7)) as sampler:
        ids, lengths = (output.as_array().copy() for output in sampler.next_padded())
        passages = plain.next(5)
        assert sampler.state_dict() == plain.state_dict()
    assert ids.dtype == np.uint16 and lengths.ravel().tolist() == [len(each.token_ids) for each in passages]
    for row, passage in zip(ids.tolist(), passages):
        assert row == [*passage.token_ids, *[7] * (ids.shape[1] - len(passage.token_ids))]


def test_damage_is_told_as_by_the_sampler(corpus: Corpus) -> None:
    path = corpus.path / "shard_00007.bin"
    data = np.fromfile(path, np.uint16)
    (data ^ 1).tofile(path)
    with dali(corpus, 6) as sampler, pytest.raises(ValueError, match=r"^corpus .* passage \d+ is damaged: .*shard_00007\.bin"):
        sampler.next(60)


def children(pid: int) -> set[int]:
    return {int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()}


def worker(pids: set[int]) -> list[int]:
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it holds within 20 seconds."""
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def is_running(pid: int) -> bool:
    """Whether there is such a process; a zombie, which nobody waits for, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def other_run(corpus: Corpus) -> Iterator[subprocess.Popen]:
    """A process that has drawn with DALI and waits."""
    code = f"""
import sys, time
sys.path.insert(0, {str(SUPPORT)!r})
from made_corpus import HasHash
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.dali_loader import DaliSampler
if __name__ == "__main__":
    sampler = DaliSampler(Corpus({str(corpus.path)!r}, HasHash()), 1, batch_size=4)
    sampler.next(1)
    print("ready", flush=True)
    time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_nothing_outlives_a_killed_run(other_run: subprocess.Popen) -> None:
    assert other_run.stdout is not None and other_run.stdout.readline() == "ready\n"
    (pid,) = worker(children(other_run.pid))
    other_run.send_signal(signal.SIGKILL)
    other_run.wait(10)
    assert wait_for(lambda: not is_running(pid))


def test_close_ends_the_process(corpus: Corpus) -> None:
    before = children(os.getpid())
    with dali(corpus, 1) as sampler:
        sampler.next(1)
        assert len(worker(children(os.getpid()) - before)) == 1
    assert worker(children(os.getpid()) - before) == []


def test_a_worker_that_is_killed_is_an_error_and_the_next_call_goes_on(corpus: Corpus) -> None:
    plain = PassageSampler(corpus, 1)
    with dali(corpus, 1) as sampler:
        assert sampler.next(3) == plain.next(3)
        (pid,) = worker(children(os.getpid()))
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not Path(f"/proc/{pid}").exists())
        with pytest.raises(RuntimeError, match="reads the corpus ahead was killed"):
            sampler.next(40)
        assert sampler.next(6) == plain.next(6)


def test_corpora_are_read_without_importing_dali() -> None:
    code = "import sys, megatron_spice.assemble; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0

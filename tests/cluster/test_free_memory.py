"""Waiting for free memory, with a reader in the driver's place; on a CPU nothing waits."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from megatron_spice.cluster import free_memory
from megatron_spice.cluster.free_memory import GIB, EngineRoom, NotFree, free_on_host, wait_until_free


class Reader:
    """Says the next number each time, the last one for ever."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.asked = numbers, 0

    def __call__(self) -> int:
        self.asked += 1
        return self.numbers[min(self.asked, len(self.numbers)) - 1]


@pytest.mark.parametrize("seed", range(20))
def test_it_returns_at_the_first_look_that_shows_enough(seed: int) -> None:
    rng = random.Random(seed)
    numbers = [rng.randrange(100) for _ in range(rng.randint(1, 30))]
    needed = rng.randrange(100)
    first = next((place for place, number in enumerate(numbers, 1) if number >= needed), None)
    reader = Reader(*numbers)
    if first is None:
        with pytest.raises(NotFree):
            wait_until_free(needed, reader, 0.02, "a test", pause=0.0)
        assert reader.asked >= 1
    else:
        assert wait_until_free(needed, reader, 10.0, "a test", pause=0.0) < 10.0
        assert reader.asked == first


def test_what_is_free_already_is_not_waited_for() -> None:
    assert wait_until_free(5, Reader(5), timeout=0.0, what="a test") < 0.1


def test_the_wait_ends_and_the_error_names_the_numbers() -> None:
    start = time.monotonic()
    with pytest.raises(NotFree, match=r"3\.00 GiB were to be free and 1\.50 GiB are, after 0 s of waiting: the policy wakes"):
        wait_until_free(3 * GIB, Reader(GIB // 2, 3 * GIB // 2), timeout=0.2, what="the policy wakes")
    assert 0.2 <= time.monotonic() - start < 1.0


def test_what_a_process_has_held_at_most_is_of_the_time_since_the_last_question(tmp_path: Path) -> None:
    before = free_memory.held("cpu")
    block = bytearray(b"x" * 2**28)
    del block
    assert free_memory.held("cpu")["memory/most_held_gib"] > 0.25
    assert 0 < free_memory.held("cpu")["memory/most_held_gib"] < before["memory/most_held_gib"] + 0.2
    assert before["memory/free_on_host_gib"] > 0
    assert free_memory.held("cpu", tmp_path / "no such process")["memory/most_held_gib"] == 0


def test_on_a_cpu_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    room = EngineRoom("cpu", weights=2**60)
    room.measure(before=0)
    monkeypatch.setattr(free_memory, "free_on_host", lambda: GIB)
    assert room.wait("weights", timeout=0.0) == {"memory/free_for_weights_gib": 1.0}


def test_an_engine_that_wakes_needs_what_it_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gave back 12 GiB, 4 of them weights."""
    reader = Reader(20 * GIB)
    monkeypatch.setattr(free_memory, "free_on_device", lambda: reader())
    monkeypatch.setattr(free_memory, "give_back_unused", lambda: None)
    room = EngineRoom("cuda", weights=4 * GIB)
    room.measure(before=8 * GIB)
    reader = Reader(3 * GIB, 4 * GIB)
    assert room.wait("weights", timeout=1.0) == {"memory/free_for_weights_gib": 4.0}
    reader = Reader(7 * GIB)
    with pytest.raises(NotFree, match="7.84 GiB were to be free and 7.00 GiB are.*kv_cache.*rollout.memory_fraction"):
        room.wait("kv_cache", timeout=0.05)


def test_where_no_engine_is_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "free_on_device", Reader(GIB))
    monkeypatch.setattr(free_memory, "give_back_unused", lambda: None)
    room = EngineRoom("cuda", weights=4 * GIB)
    room.measure(before=GIB)
    assert room.wait("weights", timeout=0.0)["memory/free_for_weights_gib"] == 1.0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="there is no /proc here")
def test_host_memory_that_is_taken_is_not_free() -> None:
    before = free_on_host()
    held = torch.ones(2**28)
    assert held[0] == 1 and 0 < free_on_host() < before


def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    assert free_on_host(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("4000000")
    (tmp_path / "memory.current").write_text("3000000")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert free_on_host(meminfo, tmp_path) == 1_500_000
    (tmp_path / "memory.max").write_text("max")
    assert free_on_host(meminfo, tmp_path) == 8000 * 1024
    assert free_on_host(tmp_path / "none", tmp_path) == 0

"""Real servers that are killed, stopped or starved while they play: every passage is played once, and nothing is left over."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_spice.cluster.interruption import Interrupted
from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.game.carried import Game, new_games
from megatron_spice.game.records import Attempt, Episode, Passage, Sampling
from megatron_spice.rollout.engine import Engine, EnginesLost
from megatron_spice.rollout.pool import Play, RolloutPool
from megatron_spice.rollout.supervisor import SCRATCH, SglangEngine
from tests.rollout.processes import processes, shared_memory

HANG = 3.0


async def play(passage: Passage, iteration: int, slot: int, engine: Engine) -> Episode:
    [completion] = await engine.generate(list(passage.token_ids), 1, Sampling(1.0, 200))
    return Episode(iteration, slot, passage, "chat", "MCQ", (Attempt(completion, None, None),))


def games(count: int) -> list[Game]:
    return new_games(1, [Passage(index, 0, "test", (40 + index, 41), "") for index in range(count)])


class Match:
    """A pool with one engine that has its weights from disk, so that a new one needs no sync."""

    def __init__(
        self, model: Path, log: Path, max_restarts: int = 3, play: Play = play, is_interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        config = RolloutConfig(threads=1, max_total_tokens=4096, max_running_requests=32, hang_timeout=HANG)
        self.engine = SglangEngine(config, Topology(), "fp32", model, log, load_format="auto")
        self.pool = RolloutPool(
            Topology(), dist.HashStore(), [self.engine], play, passages_in_flight=4, max_restarts=max_restarts,
            is_interrupted=is_interrupted,
        )  # fmt: skip
        self.pool.start()
        self.groups = {self.engine.pid}
        self.shared: set[Path] = set()

    def play(self, iteration: int, count: int, harm: Callable[[int], None] | None = None) -> tuple[int, list[str], float]:
        """Plays until nothing is missing. `harm` is done to the server's process group a moment after the start.

        Returns: rounds that were needed, what was said of lost engines, seconds of the first round.
        """
        missing, rounds, said = games(count), 0, []
        episodes: list[Episode] = []
        first = 0.0
        while missing:
            if rounds == 0 and harm is not None:
                leader = self.engine.pid
                assert leader is not None
                self.shared |= shared_memory(*processes(leader))
                threading.Timer(0.7, harm, [leader]).start()
            began = time.monotonic()
            played = self.pool.play(iteration, missing)
            episodes += played.episodes
            first = first or time.monotonic() - began
            rounds += 1
            missing = played.left
            slots = [episode.slot for episode in episodes] + [game.slot for game in missing]
            assert sorted(slots) == list(range(count)), "a passage was lost or counted twice"
            if lost := self.pool.lost():
                said += lost
                self.pool.revive()
                self.groups.add(self.engine.pid)
        assert all(len(episode.attempts[0].completion.completion_ids) > 0 for episode in episodes)
        return rounds, said, first


def scratch_folders() -> set[Path]:
    """Of this process's engines, among them one that all tests share."""
    return set(Path(tempfile.gettempdir()).glob(f"{SCRATCH}{os.getpid()}-*"))


@contextmanager
def match(model: Path, tmp_path: Path, **settings: Any) -> Iterator[Match]:
    """Afterwards there are no processes, no shared memory, no scratch folder and no open file of any server it had."""
    files, folders = len(os.listdir("/proc/self/fd")), scratch_folders()
    made = Match(model, tmp_path / "engine.log", **settings)
    try:
        yield made
    finally:
        made.pool.close()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert not [process for group in made.groups for process in processes(group)]
    deadline = time.monotonic() + 5
    while (left := [path for path in made.shared if path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert scratch_folders() == folders


def scheduler(leader: int) -> int:
    found = subprocess.run(["pgrep", "-g", str(leader), "-f", "scheduler"], capture_output=True, text=True).stdout
    return int(found.split()[0])


def test_repeated_kills_lose_no_passage_and_count_none_twice(tiny_model: Path, tmp_path: Path) -> None:
    with match(tiny_model, tmp_path) as game:
        for iteration, victim in enumerate((lambda leader: leader, scheduler), 1):
            rounds, said, _ = game.play(iteration, 60, lambda leader: os.kill(victim(leader), signal.SIGKILL))
            assert rounds == 2 and len(said) == 1, said
        assert game.pool.crew.restarts == 2
        assert game.play(9, 8)[:2] == (1, [])


def test_servers_of_a_run_that_ends_are_gone_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """Asked to end in good order it would look for that every five seconds, and then let its requests finish."""
    asked = threading.Event()
    with match(tiny_model, tmp_path, is_interrupted=asked.is_set) as game:
        [leader] = game.groups
        game.shared |= shared_memory(*processes(leader))
        threading.Timer(0.7, asked.set).start()
        with pytest.raises(Interrupted):
            game.pool.play(1, games(60))
        began = time.monotonic()
        game.pool.kill()
        assert time.monotonic() - began < 4 and not processes(leader)


@pytest.mark.parametrize("whole", [False, True], ids=["scheduler", "everything"])
def test_a_server_that_hangs_is_noticed_in_seconds(tiny_model: Path, tmp_path: Path, whole: bool) -> None:
    def stop(leader: int) -> None:
        for process in processes(leader) if whole else [scheduler(leader)]:
            os.kill(process, signal.SIGSTOP)

    with match(tiny_model, tmp_path) as game:
        rounds, said, seconds = game.play(1, 60, stop)
        assert rounds == 2 and "hangs" in said[0] and "rollout.hang_timeout" in said[0]
        assert seconds < 0.7 + HANG + 10


def test_a_slow_server_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Three quarters of the time it is stopped, for longer than it may do nothing altogether, but never at a stretch."""
    over = threading.Event()

    def hamper(leader: int) -> None:
        worker = scheduler(leader)
        for _ in range(5):
            os.kill(worker, signal.SIGSTOP)
            over.wait(HANG / 2)
            os.kill(worker, signal.SIGCONT)
            over.wait(0.3)

    with match(tiny_model, tmp_path) as game:
        assert game.play(1, 150, hamper)[:2] == (1, [])
        over.set()


def test_a_server_that_cannot_be_kept_alive_is_given_up(tiny_model: Path, tmp_path: Path) -> None:
    with match(tiny_model, tmp_path, max_restarts=0) as game:
        with pytest.raises(EnginesLost, match="(?s)rank 0.*failed once .rollout.max_restarts=0.*engine.log"):
            game.play(1, 60, lambda leader: os.kill(leader, signal.SIGKILL))


def test_a_full_disk_under_its_log_does_not_stop_a_server(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.log").symlink_to("/dev/full")
    with match(tiny_model, tmp_path) as game:
        assert game.play(1, 8)[:2] == (1, [])


def test_a_port_that_is_taken_is_a_lost_engine_and_the_next_one_has_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from megatron_spice.rollout import supervisor

    with match(tiny_model, tmp_path) as game, socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        real = supervisor.ReservedPort
        stolen = iter([thief.getsockname()[1]])

        class Taken(real):
            def __init__(self) -> None:
                super().__init__()
                self.number = next(stolen, self.number)

        monkeypatch.setattr(supervisor, "ReservedPort", Taken)
        rounds, said, _ = game.play(1, 60, lambda leader: os.kill(leader, signal.SIGKILL))
        assert rounds == 2 and len(said) == 1 and game.pool.crew.restarts == 2


STARVED = threading.Event()


async def play_growing(passage: Passage, iteration: int, slot: int, engine: Engine) -> Episode:
    """The first passages fit memory that a server has from its start. Those after them do not, and wait for it to be cut."""
    while slot >= 10 and not STARVED.is_set():
        await asyncio.sleep(0.02)
    prompt = [40 + slot, 41] if slot < 10 else [40 + slot] * 400
    [completion] = await engine.generate(prompt, 1, Sampling(1.0, 50))
    return Episode(iteration, slot, passage, "chat", "MCQ", (Attempt(completion, None, None),))


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one with an MLP so wide that a prompt of 400 tokens takes 52 MB at a time: the C library asks the kernel for
    32 MiB or more anew each time, whatever it has at hand."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "hf"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model)
    config.intermediate_size = 2**14
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_server_that_is_out_of_memory_is_noticed_in_seconds(wide_model: Path, tmp_path: Path) -> None:
    """From one moment on its scheduler gets no more memory than it has."""

    def starve(leader: int) -> None:
        resource.prlimit(scheduler(leader), resource.RLIMIT_AS, (2**20, 2**20))
        STARVED.set()

    STARVED.clear()
    with match(wide_model, tmp_path, play=play_growing) as game:
        rounds, said, seconds = game.play(1, 30, starve)
        assert rounds == 2 and len(said) == 1 and "has ended" in said[0], said
        assert seconds < 0.7 + 5
        assert "can't allocate memory" in (tmp_path / "engine.log").read_text()

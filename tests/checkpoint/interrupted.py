"""Ends a run's ranks by SIGKILL again and again and lets it go on; a program of its own, run by test_interrupted.py.

The run is the real one, `train.train` on two gloo ranks with Megatron's policy, corpus, sampler, log and checkpoints; only its
engine has no server: what it says is a hash of the request's seed and of the weights it was sent, so a resumed run
says the same if and only if it has the same weights. Ranks are forked from one process that has imported everything.

Every save notes a digest of each block that it is to write. A resumed run compares what it has loaded with them, and after each
kill so does this process with every checkpoint that looks whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_spice.cluster import platform

platform.prepare("cpu")

import torch.distributed.checkpoint  # noqa: E402

from megatron_spice import assemble, train  # noqa: E402
from megatron_spice.checkpoint import background, checkpointer, distcp, snapshot, store  # noqa: E402
from megatron_spice.config.errors import StorageError  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.game.records import Completion, Sampling  # noqa: E402
from megatron_spice.policy import policy as policy_module  # noqa: E402
from megatron_spice.telemetry import json_lines  # noqa: E402

RANKS = 2
AIMS: dict[str, tuple[Any, str, int]] = {
    "in an update": (policy_module.Policy, "update", 4),
    "in the snapshot": (snapshot.Snapshot, "take", 2),
    "before the folder is made": (background.Ranks, "tell_all", 2),
    "while the folder is made": (store, "begin", 2),
    "in a rank's file": (distcp, "save", 150),
    "before the first rank hears": (background.Ranks, "tell_first", 2),
    "in the index": (distcp, "write_index", 2),
    "before the run state": (store, "finish", 2),
    "around a rename": (Path, "rename", 6),
    "while an old one is removed": (store, "_remove", 2),
    "in the log": (json_lines.JsonLines, "write", 6),
    "while it is loaded": (policy_module.Policy, "load_state", 1),  # last, when there is something to load
}
"""Where to kill: a function, and up to which of its calls."""

HIT = "hit"  # a file that is there when a run was killed where it was aimed at
READY = "ready"  # a file that is there when the run begins to iterate
UNREACHED = 60.0  # seconds after which a run is killed that has not come to where it was aimed at
LEFT = 99  # exit code of a rank that has found something wrong


class HashEngine:
    """An engine without a server; see above."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._weights = hashlib.sha256()
        self._version = ""

    def _nothing(self, *arguments: Any) -> None:
        pass

    launch = wait_ready = close = kill = check = sleep = wake = _nothing

    async def abort(self) -> None:
        pass

    async def close_requests(self) -> None:
        pass

    def begin_update(self) -> None:
        self._weights = hashlib.sha256()

    def update_bucket(self, named_tensors: Any) -> None:
        for name, tensor in named_tensors:
            self._weights.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def end_update(self, version: str) -> None:
        self._version = version

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        await asyncio.sleep(0.002)
        return [self._one(tuple(prompt_ids), sampling, index) for index in range(num_samples)]

    def _one(self, prompt_ids: tuple[int, ...], sampling: Sampling, index: int) -> Completion:
        dice = random.Random(f"{self._weights.hexdigest()} {sampling.seed_of(index)} {prompt_ids}")
        ids = tuple(dice.randrange(60, 200) for _ in range(sampling.max_new_tokens))
        return Completion(prompt_ids, ids, tuple(-dice.random() for _ in ids), "length", str(ids), self._version)


class NoVerifier:
    """Stands for the processes that judge answers: the engine's tasks are never valid."""

    def __init__(self, config: Any) -> None:
        pass

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


def digests(pieces: Any) -> dict[str, str]:
    """Of each block a rank holds."""
    return {
        f"{piece.key} {list(piece.offsets)}": hashlib.sha256(piece.tensor.clone().view(torch.uint8).numpy().tobytes()).hexdigest()
        for piece in pieces
    }


def _noted(notes: Path, iteration: int, rank: int) -> Path:
    return notes / f"{iteration}_{rank}.json"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rank(
    recipe: Path, overrides: list[str], notes: Path, aim: tuple[str, int, bool] | None, act: Callable[[], None] = die
) -> int:
    """One rank of the run; returns its exit code. `aim`: at which of AIMS to act, in which call, before it or after it."""
    begin, load, me = checkpointer.Checkpointer.begin, checkpointer.load_tensors, int(os.environ["RANK"])

    def noting_begin(self: Any, policy: Any, state: dict[str, Any], is_over: bool = False) -> None:
        path = _noted(notes, state["iteration"], me)
        path.with_suffix(".new").write_text(json.dumps(digests(policy.holdings(True).pieces)))
        path.with_suffix(".new").replace(path)
        begin(self, policy, state, is_over)

    def comparing_load(policy: Any, checkpoint: Path, with_optimizer: bool) -> None:
        load(policy, checkpoint, with_optimizer)
        noted = json.loads(_noted(notes, store.iteration_of(checkpoint), me).read_text())
        if digests(policy.holdings(True).pieces) != noted:
            print(f"what was loaded from {checkpoint} is not what was saved", flush=True)
            os._exit(LEFT)

    checkpointer.Checkpointer.begin, checkpointer.load_tensors = noting_begin, comparing_load
    def build(*arguments: Any) -> Any:
        run = assemble.assemble(*arguments, make_engine=HashEngine)
        (notes / READY).touch()
        return run

    assemble.Verifier, assemble.copy_rate = NoVerifier, lambda device: 1e9
    if aim is not None:
        _act_at(*aim, act)
    try:
        train.train(load_config(recipe, overrides), build)
    except StorageError as error:  # as __main__ does
        print(f"megatron_spice (rank {me}): {error}", flush=True)
        return 1
    return 0


def _act_at(name: str, call: int, before: bool, act: Callable[[], None]) -> None:
    home, function, _ = AIMS[name]
    original, calls = getattr(home, function), [0]

    @functools.wraps(original)
    def acting(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        this = calls[0]
        if this == call and before:
            act()
        value = original(*arguments, **named)
        if this == call and not before:
            act()
        return value

    for module in (home, background, checkpointer, store) if home in (store, distcp) else (home,):
        if getattr(module, function, None) is original:
            setattr(module, function, acting)


def start(work: Callable[[int], int], log: Path) -> dict[int, int]:
    """Forks the ranks; returns their process ids by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = {}
    for number in range(RANKS):
        pid = os.fork()
        if pid:
            pids[number] = pid
            continue
        os.environ |= {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = work(number)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def wait(
    pids: dict[int, int], kill_at: float | None, victims: list[int], since: Path | None = None, limit: float = 120.0
) -> dict[int, int]:
    """Exit codes by rank (negative: the signal). At `kill_at` seconds, from when a file is there if one is given (`since`), the
    victims are killed. Once one has gone that way or otherwise failed, the others are ended, by another signal: they may have
    noticed before and failed themselves."""
    began, codes = time.monotonic(), {}
    end = began + limit
    while len(codes) < len(pids):
        if since is not None:
            began, since = time.monotonic(), None if since.exists() else since
        now = time.monotonic() - began
        if time.monotonic() > end:
            kill_at, victims, since = now, list(pids), None
        if since is None and kill_at is not None and now >= kill_at:
            kill_at = None
            for each in victims:
                _kill(pids, codes, each)
        for number, pid in pids.items():
            if number not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[number] = os.waitstatus_to_exitcode(found[1])
                if codes[number]:
                    for each in pids:
                        _kill(pids, codes, each, signal.SIGQUIT)
        time.sleep(0.002)
    return codes


def _kill(pids: dict[int, int], codes: dict[int, int], number: int, how: int = signal.SIGKILL) -> None:
    if number not in codes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[number], how)


def assert_whole(run_dir: Path, notes: Path) -> list[int]:
    """The iterations of all checkpoints that look whole; each block of them is what was noted, and no block is missing."""
    found = store.whole_checkpoints(store.folder_of(run_dir))
    for checkpoint in found:
        iteration = store.iteration_of(checkpoint)
        assert store.read_state(checkpoint)["iteration"] == iteration
        noted = {k: v for each in range(RANKS) for k, v in json.loads(_noted(notes, iteration, each).read_text()).items()}
        reader = torch.distributed.checkpoint.FileSystemReader(checkpoint / store.WEIGHTS)
        for index, place in reader.read_metadata().storage_data.items():
            if index.offset is not None:
                with open(checkpoint / store.WEIGHTS / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
                name = f"{index.fqn} {list(index.offset)}"
                digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
                assert noted.pop(name) == digest, f"{checkpoint}: {name}"
        assert not noted, f"{checkpoint} lacks {sorted(noted)[:3]}"
        assert json.loads((checkpoint / store.HF / "config.json").read_text())
    return [store.iteration_of(checkpoint) for checkpoint in found]


def campaign(recipe: Path, folder: Path, moments: int, seed: int, aims_in_turn: Iterator[str]) -> dict[str, Any]:
    """Kills a run `moments` times, each time somewhere else, and lets it end; then does it all without a kill. Every other moment is
    the next of `aims_in_turn`.

    Returns: what happened at each moment, and whether both runs came to the same.
    """
    dice, told, newest = random.Random(seed), [], 0
    run_dir, notes = folder / "killed", folder / "notes"
    notes.mkdir(parents=True)
    settings = [*SETTINGS, f"checkpoint.every={dice.choice([1, 1, 2, 3])}"]

    def attempt(
        iterations: int, where: Path, aim: Any, victims: list[int], kill_at: float | None, starting: bool = False
    ) -> dict[int, int]:
        for each in (READY, HIT):
            (notes / each).unlink(missing_ok=True)
        told_where = [*settings, f"run.dir={where}", f"train.iterations={iterations}"]
        aims = {each: aim for each in victims[:1]}
        act = lambda: (notes / HIT).touch() or die()  # noqa: E731
        pids = start(lambda me: rank(recipe, told_where, notes, aims.get(me), act), where.with_suffix(".log"))
        return wait(pids, kill_at, victims, None if starting else notes / READY)

    for moment in range(moments):
        aimed, victims = moment % 2 == 0, [[0], [1], [0, 1]][moment // 2 % 3]
        aim = None
        if aimed:
            name = next(aims_in_turn)
            aim = (name, dice.randint(1, AIMS[name][2]), dice.random() < 0.5)
            # What only the first rank does kills only there.
            if AIMS[name][0] in (store, json_lines.JsonLines, Path) or name == "in the index":
                victims = [0]
        starting = not aimed and dice.random() < 0.25
        kill_at = UNREACHED if aimed else dice.uniform(0.1, 1.0 if starting else 2.0)
        codes = attempt(10**6, run_dir, aim, victims, kill_at, starting)
        assert LEFT not in codes.values() and codes[victims[0]] == -signal.SIGKILL, (folder, moment, codes)
        whole = assert_whole(run_dir, notes)
        assert not newest or newest <= whole[-1], f"checkpoint {newest} is gone: {whole}"
        newest = whole[-1] if whole else 0
        partial = [path.name for path in store.folder_of(run_dir).glob("*.partial")] if run_dir.exists() else []
        hit = aimed and (notes / HIT).exists()
        told.append({
            "aim": aim, "hit": hit, "victims": victims, "seconds": kill_at, "starting": starting, "whole": whole, "partial": partial,
        })  # fmt: skip
    last = newest + 2
    assert set(attempt(last, run_dir, None, [], None).values()) == {0}
    assert_whole(run_dir, notes)
    resumed = outcome(run_dir, notes, last)
    assert set(attempt(last, folder / "through", None, [], None).values()) == {0}
    same = resumed == outcome(folder / "through", notes, last)
    return {"aims": list(AIMS), "moments": told, "iterations": last, "same": same, "outcome": resumed}


def outcome(run_dir: Path, notes: Path, last: int) -> dict[str, Any]:
    """Everything that two runs may differ in: what was played, and the last iteration's weights and optimiser state."""
    lines = [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]
    played = [(line["iteration"], line["passage"]["index"], [a["text"] for a in line["attempts"]]) for line in lines]
    return {"played": played, "state": [json.loads(_noted(notes, last, each).read_text()) for each in range(RANKS)]}


SETTINGS = [
    "policy.pipeline_parallel_size=1", "policy.entropy_bonus=0.01", "rollout.deterministic=true", "rollout.verify_sync=false",
    "telemetry.tensorboard=false", "cluster.timeout=60", "train.passages=2",
]  # fmt: skip

if __name__ == "__main__":
    where = Path(sys.argv[2])
    results, aims_in_turn = [], itertools.cycle(AIMS)
    for number, size in enumerate(map(int, sys.argv[3].split(","))):
        results.append(campaign(Path(sys.argv[1]), where / str(number), size, int(sys.argv[4]) + number, aims_in_turn))
        (where / "results.json").write_text(json.dumps(results))

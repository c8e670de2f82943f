"""Asks a run to end while it plays, and lets it go on; a program of its own, run by test_asked_to_end.py.

The run is that of `interrupted.py`, on a policy that sleeps as deep as one on an accelerator. From the moment at which it is asked
nothing may be woken, and no write of a checkpoint goes on before the engine has been killed: were engines ended first, or
waited for, nothing would be saved.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interrupted
from interrupted import HashEngine, background, policy_module

SETTINGS = [*interrupted.SETTINGS, "policy.sleep=all", "policy.precision=bf16"]
LAST = 4
LIMIT = 60.0  # seconds
WRITER = "checkpoint"  # the thread's name


def ask_while_playing(iteration: int) -> None:
    """Sends this process SIGTERM as it begins to play an iteration, if it has the engine."""
    generate, kill, write, wake = HashEngine.generate, HashEngine.kill, background.write, policy_module.Policy.wake
    asked, killed = threading.Event(), threading.Event()

    async def asking(self: Any, *arguments: Any) -> Any:
        if self._version == str(iteration - 1) and not asked.is_set():
            asked.set()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(LIMIT)
        return await generate(self, *arguments)

    def noting(self: Any) -> None:
        assert any(thread.name == WRITER for thread in threading.enumerate()), "killed before the save has begun"
        killed.set()
        kill(self)

    def held_up(*arguments: Any) -> Any:
        if not killed.wait(LIMIT):
            raise OSError("the engine was not killed while the save was under way")
        return write(*arguments)

    def guarded(self: Any) -> Any:
        assert not asked.is_set(), "the policy was woken to be saved"
        return wake(self)

    HashEngine.generate, HashEngine.kill, policy_module.Policy.wake = asking, noting, guarded
    if os.environ["RANK"] == "0":  # where the engine is
        background.write = held_up


def run(recipe: Path, run_dir: Path, every: int, prepare: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One start of a run; returns its exit codes and checkpoints, and what it came to if it has come to its end."""
    notes = run_dir.with_suffix(".notes")
    notes.mkdir(exist_ok=True)
    settings = [*SETTINGS, f"run.dir={run_dir}", f"train.iterations={LAST}", f"checkpoint.every={every}"]
    pids = interrupted.start(lambda me: prepare() or interrupted.rank(recipe, settings, notes, None), run_dir.with_suffix(".log"))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids.values()]
    came_to = None if any(codes) else interrupted.outcome(run_dir, notes, LAST)
    return {"codes": codes, "whole": interrupted.assert_whole(run_dir, notes), "came_to": came_to}


def campaign(recipe: Path, folder: Path) -> dict[str, Any]:
    """Asks runs that save `every` so many iterations to end in an `iteration`, and lets them go on; and one that nobody asks."""
    found: dict[str, Any] = {"through": run(recipe, folder / "through", 100)}
    for name, every, iteration in (("unsaved", 100, 3), ("in a save", 2, 4)):
        asked = run(recipe, folder / name, every, lambda at=iteration: ask_while_playing(at))
        found[name] = {"asked": asked, "resumed": run(recipe, folder / name, every)}
    return found


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]))))

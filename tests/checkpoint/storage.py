"""Fills a run's file system, or takes it away, at chosen moments; a program of its own, run by test_storage.py as root.

The runs and their engine are those of interrupted.py. Each gets a small file system of its own, has something done to it by the
first rank, must end by itself, and goes on once the file system is as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interrupted import SETTINGS, assert_whole, outcome, rank, start, wait

SIZE = "14m"  # three checkpoints of 2.7 MiB are there at once
LAST = 5  # iterations; all that is done to a run is done before


def fill(mount: Path, but: int = 0) -> None:
    """Leaves `but` bytes."""
    with contextlib.suppress(OSError), open(mount / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    if but:
        os.truncate(mount / "filler", (mount / "filler").stat().st_size - but)


def run(recipe: Path, run_dir: Path, notes: Path, iterations: int, aim: Any = None, act: Callable[[], None] | None = None) -> dict:
    """Runs until it ends; returns the ranks' exit codes and what they printed."""
    log = notes.parent / f"{notes.name}.log"
    log.unlink(missing_ok=True)
    overrides = [*SETTINGS, "checkpoint.every=1", f"run.dir={run_dir}", f"train.iterations={iterations}"]
    acts = {0: (aim, act)} if aim else {}
    codes = wait(start(lambda me: rank(recipe, overrides, notes, *acts.get(me, (None,))), log), None, [])
    return {"codes": codes, "log": log.read_text()}


def case(recipe: Path, folder: Path, name: str, aim: Any, how: str) -> dict[str, Any]:
    """One run; returns how it ended, which checkpoints were there then, and what it came to after it had gone on."""
    mount, notes, real = folder / name, folder / f"{name} notes", folder / f"{name} real"
    for each in (mount, notes, real):
        each.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", real], check=True)
    subprocess.run(["mount", "--bind", real, mount], check=True)
    run_dir = mount / "run"
    acts: dict[str, Callable[[], None]] = {
        "fill": lambda: fill(real), "almost": lambda: fill(real, 2**20), "remove": lambda: shutil.rmtree(run_dir),
        "unmount": lambda: subprocess.run(["umount", "--lazy", mount], check=True) and None,
    }  # fmt: skip
    try:
        first = run(recipe, run_dir, notes, LAST, aim, acts[how])
        left_behind = sorted(str(path) for path in mount.rglob("*")) if how == "unmount" else []
        whole = assert_whole(real / "run", notes)
        (real / "filler").unlink(missing_ok=True)
        if how == "unmount":
            subprocess.run(["mount", "--bind", real, mount], check=True)
        second = run(recipe, run_dir, notes, LAST)
        assert set(second["codes"].values()) == {0}, second["log"][-3000:]
        assert_whole(run_dir, notes)
        return {**first, "whole": whole, "left_behind": left_behind, "outcome": outcome(run_dir, notes, LAST)}
    finally:
        for each in (mount, real):
            subprocess.run(["umount", "--lazy", each], check=False, stderr=subprocess.DEVNULL)


CASES = {
    "room": (("before the folder is made", 3, True), "almost"),
    "file": (("in a rank's file", 300, True), "fill"),
    "index": (("in the index", 3, True), "fill"),
    "state": (("before the run state", 3, True), "fill"),
    "episodes": (("in the log", 5, True), "fill"),
    "metrics": (("in the log", 6, True), "fill"),
    "removed": (("in the log", 5, True), "remove"),
    "unmounted": (("before the folder is made", 3, True), "unmount"),
}

if __name__ == "__main__":
    where = Path(sys.argv[2])
    through = where / "through"
    (through / "notes").mkdir(parents=True)
    assert set(run(Path(sys.argv[1]), through / "run", through / "notes", LAST)["codes"].values()) == {0}
    results = {name: case(Path(sys.argv[1]), where, name, *what) for name, what in CASES.items()}
    expected = outcome(through / "run", through / "notes", LAST)
    told = {name: {**result, "same": result.pop("outcome") == expected} for name, result in results.items()}
    (where / "results.json").write_text(json.dumps(told))

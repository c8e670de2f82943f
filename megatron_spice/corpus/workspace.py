"""The folder beside the output in which a corpus is made: `.NAME.partial`, with a lock, the request, and finished parts.

Whatever ends a run leaves the finished parts there, and the same request goes on with them. Another request is refused, since
it must not get another's parts; so is a second run at the same time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

STAGES = "stages"  # folder in it, of what stages have found (stages/preparation.py)
_PATIENCE = 3.0  # seconds: the workers of a run that was killed need a moment to notice


class Unfinished(ValueError):
    """There is another, unfinished run for the same output."""


def workspace_path(output: Path) -> Path:
    """Where the corpus for `output` is made."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def workspace(output: Path, request: dict, *, restart: bool = False) -> Iterator[Path]:
    """The folder to make `output` in, locked; with finished parts of the same request if there are any.

    Args:
        request: all that decides what comes out; JSON.
        restart: throw away what an earlier run left.

    Raises:
        Unfinished: a run is at work there, or one with another request has left finished parts.
    """
    folder = workspace_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, output):
        _agree(folder, output, request, restart)
        try:
            yield folder
        finally:
            for unfinished in folder.glob("*.unfinished"):
                shutil.rmtree(unfinished, ignore_errors=True)
            if not has_work(folder):
                shutil.rmtree(folder, ignore_errors=True)


def finished_parts(folder: Path) -> int:
    """How many parts an earlier run has left."""
    return sum(path.suffix == "" for path in folder.glob("part_*"))


def has_work(folder: Path) -> bool:
    """Whether an earlier run has left anything that the same request could go on with."""
    return finished_parts(folder) > 0 or (folder / "corpus").exists() or any((folder / STAGES).glob("judged/*.jsonl"))


def _locked(folder: Path, output: Path) -> IO[str]:
    """The folder's lock file, open and locked; closing it gives the lock up, and so does the end of all processes that have it."""
    until = time.monotonic() + _PATIENCE
    while True:
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(lock.name) and os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                return lock  # and not one that another run has deleted meanwhile
        except BlockingIOError:
            if time.monotonic() > until:
                raise Unfinished(f"another run is making {output}; wait for it, or give another --output") from None
        lock.close()
        time.sleep(0.1)


def _agree(folder: Path, output: Path, request: dict, restart: bool) -> None:
    path = folder / "request.json"
    done = finished_parts(folder)
    if restart or not path.is_file() or not has_work(folder):
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
    else:
        different = differences(_read(path), request)
        if different:
            raise Unfinished(
                f"{folder} holds {done} finished parts of an unfinished run that was asked for something else: "
                f"{'; '.join(different)}; ask for the same to go on with it, or give --restart to throw them away"
            )
    _write(path, request)


def shared_folder(folder: Path, request: dict) -> Path:
    """A folder that several runs use at once, with the same request.

    Raises:
        Unfinished: it is of another request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "request.json"
    if path.is_file():
        different = differences(_read(path), request)
        if different:
            raise Unfinished(
                f"{folder} is of tasks that were asked for something else: {'; '.join(different)}; "
                "ask for the same, delete it, or give another --output"
            )
    else:
        _write(path, request)
    return folder


def _write(path: Path, request: dict) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".request.", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(request, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"request": "unreadable"}


def differences(before: dict, now: dict, name: str = "") -> list[str]:
    """In what two requests differ, in words."""
    found = []
    for key in {**before, **now}:
        here, there, full = before.get(key), now.get(key), f"{name}{key}"
        if here == there:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, f"{full}.")
        elif isinstance(here, list) and isinstance(there, list):
            found.append(_difference_of_lists(full, here, there))
        else:
            found.append(f"{full} (before: {here}, now: {there})")
    return found


def _difference_of_lists(name: str, before: list, now: list) -> str:
    if len(before) != len(now):
        return f"{name} (before: {len(before)}, now: {len(now)})"
    first = next((here, there) for here, there in zip(before, now) if here != there)
    if all(isinstance(entry, dict) for entry in first):
        return f"{name} ({first[1].get('path', '')}: {', '.join(differences(*first))})"
    return f"{name} (before: {first[0]}, now: {first[1]})"

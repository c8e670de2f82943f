"""Where a run's checkpoints lie and which of them are whole.

    checkpoints/iteration_0000010/
        weights/        Megatron's torch_dist files: model, and the optimiser when training can go on from here
        hf/             config.json, tokenizer and generation files of the model
        run_state.json  iteration and corpus cursor; written last inside a `.partial` folder that is then renamed

The rename is what makes a checkpoint: whatever was interrupted before it leaves only a `.partial` folder, which nothing
loads and the next save removes. Each start of a run has `.partial` folders of its own, `iteration_0000010.ATTEMPT.partial`, and one
that is removed loses its name first, so that two runs in one folder (`ownership.py`) never make one checkpoint together.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = re.compile(r"iteration_(\d{7})")
MB = 10**6
STATE = "run_state.json"
WEIGHTS = "weights"
HF = "hf"
OLD = ".old"
ALONE = "0"
"""The name of a start that is the only one."""


def name_of(iteration: int) -> str:
    return f"iteration_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1])


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: path.name)


def folder_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def newest_iteration(run_dir: Path) -> int:
    """The iteration of a run's newest whole checkpoint, 0 if it has none."""
    whole = whole_checkpoints(folder_of(run_dir))
    return iteration_of(whole[-1]) if whole else 0


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves have left in `folder`, which the next save removes."""
    return list(folder.glob("iteration_*.partial"))


def bytes_of_leftovers(folder: Path) -> int:
    """What removing them gives back to the file system; what is removed meanwhile, by another save, counts for nothing."""
    total = 0
    for leftover in leftovers(folder):
        for inside, _, files in os.walk(leftover):
            for name in files:
                with suppress(OSError):
                    total += os.lstat(os.path.join(inside, name)).st_blocks * 512
    return total


def identity(run_dir: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name, and from the one it is mounted over; None if there is none."""
    try:
        found = os.stat(run_dir)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def begin(folder: Path, iteration: int, num_bytes: int = 0, attempt: str = ALONE, look: Callable[[], None] = lambda: None) -> Path:
    """An empty `.partial` folder to save `num_bytes` into, this `attempt`'s own; leftovers of interrupted saves are removed, as far as
    the file system lets them go: NFS keeps a file that somebody has open. They are in nobody's way.

    Args:
        look: raises where the run has lost its folder. It is called between finding what is to be removed and removing it: so that
            is never of a start that took the folder over.

    Raises:
        OSError: there is no room for it, or no folder can be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name_of(iteration)}.{attempt}.partial"
    found = leftovers(folder)
    look()
    for leftover in found:
        with suppress(OSError):  # a run that has lost the folder may have made it whole just now
            if leftover.name.endswith(f"{OLD}.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                _remove(leftover)
    check_room(folder, num_bytes)
    (partial / WEIGHTS).mkdir(parents=True)
    return partial


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError if the file system of an existing folder has not `num_bytes` free."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        raise OSError(
            f"{num_bytes / MB:.1f} MB are needed and the file system of {folder} has {free / MB:.1f} MB free; "
            f"make room for {(num_bytes - free) / MB:.1f} MB more there, give checkpoint.keep less, or move run.dir"
        )


def give_up(partial: Path) -> None:
    """Removes what there is of a save that failed: on a full file system it is in the way of everything else."""
    with suppress(OSError):
        _remove(partial)


def finish(partial: Path, state: dict[str, Any], keep: int, look: Callable[[], None] = lambda: None) -> Path:
    """Writes the run state, brings what is not there yet to the disk, renames the folder to its final name, and removes all but
    the newest `keep`. The files in `weights` are on the disk already.

    Args:
        look: as for `begin`.
    """
    with open(partial / STATE, "w") as file:
        file.write(json.dumps(state, indent=1))
        file.flush()
        os.fsync(file.fileno())
    for path in (*(partial / HF).rglob("*"), partial / HF, partial / WEIGHTS, partial):
        if path.exists():
            sync_folder(path)  # files are opened and synced in the same way
    final = partial.with_name(partial.name.partition(".")[0])
    _take_name(partial, final, look)
    sync_folder(final.parent)
    # The save has succeeded: an old checkpoint that cannot be removed is left to the next one.
    others = [path for path in whole_checkpoints(final.parent) if path != final]
    look()
    for old in others[: max(0, len(others) - (keep - 1))]:
        with suppress(OSError):
            _remove(old)
    return final


def _take_name(partial: Path, final: Path, look: Callable[[], None]) -> None:
    """Gives a folder its final name. One that has it is the same iteration's: of this run before it was resumed from an earlier one,
    or of a run that was about to lose its folder, and then perhaps only just there."""
    for is_last in (False, True):
        is_there = final.exists()
        look()
        if is_there:
            _remove(final)
        try:
            partial.rename(final)
            return
        except OSError as error:
            if is_last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a removal that is interrupted must not leave half a checkpoint that looks whole, and nobody may make
    one of what is being removed. What stays under the other name is a leftover, which `begin` removes.

    Raises:
        OSError: it keeps its name.
    """
    name = checkpoint.name.removesuffix(".partial")
    doomed = checkpoint.with_name(f"{name}{OLD}.partial")
    number = 1
    while doomed.exists():  # of an earlier removal that did not come to its end
        number += 1
        doomed = checkpoint.with_name(f"{name}.{number}{OLD}.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes names in `folder`, and so a rename, survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run state of a whole checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def is_megatron(model: Path) -> bool:
    """Whether `model` is a checkpoint of ours rather than a Hugging Face folder."""
    return (model / WEIGHTS).is_dir() and (model / HF).is_dir()

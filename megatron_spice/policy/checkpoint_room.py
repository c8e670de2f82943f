"""Whether a run's checkpoints fit where they are to go, said before the run starts."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_spice.checkpoint import store
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import Config
from megatron_spice.policy.memory_budget import file_bytes
from megatron_spice.policy.parameter_count import engine_parameters

GB = 10**9


def checkpoint_bytes(config: Config, architecture: ModelArchitecture) -> int:
    """Bytes of one checkpoint's tensors."""
    return engine_parameters(architecture, 1) * file_bytes(config.policy.precision)


def describe(config: Config, architecture: ModelArchitecture, from_afar: bool = False) -> tuple[str, str | None]:
    """What checkpoints take and what there is, in words, and what is in the way of even one.

    While one is written, `checkpoint.keep` others are there; those that are there already need no more room, and what interrupted
    saves have left makes room: the next save removes it first. A run that has all its iterations saves none.

    Args:
        from_afar: the run will not be started in this process, so a file system that is not mounted here is no problem of its.
    """
    run_dir, keep = config.run.dir, config.checkpoint.keep
    done = store.newest_iteration(run_dir) if config.checkpoint.resume == "auto" else 0
    if done >= config.train.iterations:
        return f"# Checkpoints: {run_dir} is at iteration {done} of {config.train.iterations} already: none will be saved\n", None
    folder = store.folder_of(run_dir)
    there = min(keep, len(store.whole_checkpoints(folder)))
    one = checkpoint_bytes(config, architecture)
    needed = (keep + 1 - there) * one
    text = (
        f"# Checkpoints: {one / GB:.2f} GB each; checkpoint.keep={keep} and one that is written, of which {there} are there, need "
        f"{needed / GB:.2f} GB more; "
    )
    if from_afar and _nearest_folder(run_dir) == Path("/"):
        return f"{text}what is free cannot be seen from here: nothing of run.dir={run_dir} is on this machine\n", None
    left = store.bytes_of_leftovers(folder)
    free = _free(run_dir) + left
    of_them = f", {left / GB:.2f} of them in what interrupted saves have left, which the next one removes"
    said = f"{free / GB:.2f} GB free{of_them if left else ''}"
    text += f"the file system of run.dir has {said}\n"
    if free >= needed:
        return text, None
    key = f"run.dir={run_dir}: its file system has {said}, checkpoint.keep={keep}"
    if free < one:
        return text, f"{key}, and a checkpoint takes {one / GB:.2f} GB; make room, or name a run.dir where there is"
    fewer = "" if keep == 1 else ", give checkpoint.keep=1"
    return f"{text}warning: {key} and one more need {needed / GB:.2f} GB; make room{fewer}, or name another run.dir\n", None


def _nearest_folder(path: Path) -> Path:
    """`path`, or the folder that is there and that it would be made in."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _free(path: Path) -> int:
    """Bytes free where `path` is or would be made."""
    found = os.statvfs(_nearest_folder(path))
    return found.f_bavail * found.f_frsize

"""A conversion that is there whole or not at all, and that goes on where an earlier one was stopped.

    TARGET.partial/                 until everything is on the disk; then it takes the target's name
        .convert/request.json       what was asked for, and the sizes and times of the source's files
        .convert/prepared           what all parts share is there
        .convert/part-00007.json    the record of a part that is on the disk

The folder is locked while someone works on it. A request that differs from the recorded one, such as of a source that has
changed since, is refused: half of a folder would be of another model.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_spice.convert.disk import sync_file, sync_folder, sync_tree
from megatron_spice.convert.source import Source
from megatron_spice.convert.target import Part, Target, Written
from megatron_spice.convert.workers import Progress, write_parts

STATE = ".convert"
SPARE = 2**24
"""Bytes for small files that need not be counted."""


class Stopped(RuntimeError):
    """Whoever asked for a conversion wants it no more; what is whole is kept for another time."""


def convert(
    source: Source, target: Target, folder: Path, asked: Mapping[str, Any], processes: int, label: str,
    is_stopped: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Writes `target` as `folder`.

    Args:
        asked: what makes this conversion another than others of the source: direction, format, precision, layout.
        is_stopped: looked at a few times a second while parts are written, for a caller in another thread, which no signal reaches.

    Returns:
        Bytes written, those of earlier runs not counted.

    Raises:
        ValueError: `folder` is there, or being written by another process, or was begun otherwise; no space.
        Stopped: `is_stopped` said so.
    """

    def advance(written: int) -> None:
        if is_stopped():
            raise Stopped(f"{folder}: stopped while it was written")
        progress(written)

    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists; remove it or name another target")
    partial = folder.with_name(folder.name + ".partial")
    with _locked(partial):
        _begin(partial, {**asked, "source": str(source.folder.resolve()), "files": _files(source), "parts": len(target.parts)})
        done = {part.number for part in target.parts if _record(partial, part).exists()}
        left = [part for part in target.parts if part.number not in done]
        total, missing = (sum(part.num_bytes for part in parts) for parts in (target.parts, left))
        _need_space(partial, total)
        progress = Progress(label, total, total - missing)
        try:
            _prepare(partial, target)
            write_parts(
                left,
                lambda part, advance: target.write(part, partial, source, advance),
                lambda batch: _keep(partial, batch),
                processes,
                advance,
            )
            target.finish(partial, [json.loads(_record(partial, part).read_text()) for part in target.parts])
            shutil.rmtree(partial / STATE)
            sync_tree(partial)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"no space left for {partial} ({error.strerror}); make room and give the same command again: what is whole is kept"
            ) from error
        finally:
            progress.end()
        if os.path.lexists(folder):
            raise ValueError(f"{folder} has come into being meanwhile; remove it, and rename {partial}, which is whole")
        partial.rename(folder)
        sync_folder(folder.parent)
    return missing


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Holds the folder, which is made if it is not there. A lock on the folder itself leaves nothing behind and ends with
    its process."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"{partial} cannot be made: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {partial}; wait for it, or end it") from error
        except OSError as error:
            # NFS locks only what is open for writing, which a folder never is, and some file systems lock nothing.
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        if not partial.exists() or os.stat(partial).st_ino != os.fstat(descriptor).st_ino:
            raise ValueError(f"another process has just finished {partial.with_suffix('')}")
        yield
    finally:
        os.close(descriptor)


def _begin(partial: Path, request: dict[str, Any]) -> None:
    """Takes up what is there if it was begun by the same request, begins if nothing is there, and refuses otherwise."""
    path = partial / STATE / "request.json"
    request = json.loads(json.dumps(request))
    if not path.exists():
        if any(child.name != STATE for child in partial.iterdir()):
            raise ValueError(f"{partial} holds files of something else; remove it or name another target")
        path.parent.mkdir(exist_ok=True)
        _write_json(path, request)
        return
    before = json.loads(path.read_text())
    other = [key for key in request if before.get(key) != request[key]]
    if other:
        what = "the source has changed since" if other == ["files"] else f"it was asked for with another {', '.join(other)}"
        raise ValueError(f"{partial} was begun by another conversion: {what}; remove it to begin anew")


def _files(source: Source) -> dict[str, Any]:
    """What tells whether a source is the same: its files' names, sizes and times of change."""
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path in source.paths for stat in [path.stat()]}


def _need_space(partial: Path, num_bytes: int) -> None:
    """Looks before anything is written; what an earlier run took up counts as free."""
    taken = sum(512 * path.stat().st_blocks for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free + taken
    if num_bytes + SPARE > free:
        raise ValueError(
            f"{partial.parent} has room for {free / 1e9:.2f} GB, {num_bytes / 1e9:.2f} GB are to be written; make room or name another "
            "target"
        )


def _prepare(partial: Path, target: Target) -> None:
    prepared = partial / STATE / "prepared"
    if not prepared.exists():
        target.prepare(partial)
        sync_tree(partial)
        prepared.touch()
    target.open(partial)


def _keep(partial: Path, batch: Sequence[tuple[Part, Written]]) -> None:
    """Brings parts to the disk, then writes their records, which say that they are there."""
    descriptors = [descriptor for _, written in batch for descriptor in written.descriptors]
    for descriptor in {os.fstat(descriptor).st_ino: descriptor for descriptor in descriptors}.values():
        os.fsync(descriptor)
    for descriptor in descriptors:
        os.close(descriptor)
    for part, written in batch:
        _write_json(_record(partial, part), written.record)


def _record(partial: Path, part: Part) -> Path:
    return partial / STATE / f"part-{part.number:05d}.json"


def _write_json(path: Path, value: Any) -> None:
    """So that it is there whole or not at all."""
    beside = path.with_suffix(".new")
    with open(beside, "w") as file:
        json.dump(value, file)
        sync_file(file)
    beside.rename(path)
    sync_folder(path.parent)

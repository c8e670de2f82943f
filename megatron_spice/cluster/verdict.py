"""From where each rank is to who hangs, in one message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a device or file system", "Z": "ended"}


@dataclass(frozen=True)
class Place:
    """Where a rank is. `since` (its phase) and `told` are wall-clock seconds on its own node, `still` for how long it has not
    moved; `waits` the collective it waits in, `mates` the unusual states of processes on its node, by rank."""

    rank: int
    host: str
    process: int
    phase: str
    since: float
    told: float
    waits: str | None = None
    still: float = 0.0
    at: str = ""
    mates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Place:
        """The place that `record` was made from."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def with_mates(self, mates: dict[str, str]) -> Place:
        """With what is known of its neighbours."""
        return replace(self, mates=mates)

    def words(self) -> str:
        """What it does, for a person."""
        seconds = f"{max(self.told - self.since, self.still):.0f} s"
        if self.waits is not None:
            return f"rank {self.rank} ({self.host}) waits in {self.waits} of {self.phase}"
        return f"rank {self.rank} ({self.host}) has been in {self.phase} for {seconds}, at {self.at}"


def words(
    places: Mapping[int, Place], silent: Mapping[int, Place], world_size: int, timeout: float, log_of: Callable[[int], Path]
) -> str:
    """The message of a hang.

    Args:
        places: what each rank that lives has told.
        silent: what is known from before of those that have not.
    """
    quiet = [rank for rank in range(world_size) if rank not in places]
    busy = [place for place in places.values() if place.waits is None]
    waiting: dict[str, list[int]] = {}
    for place in places.values():
        if place.waits is not None:
            waiting.setdefault(f"{place.waits} of {place.phase}", []).append(place.rank)
    states = {rank: state for place in places.values() for rank, state in place.mates.items()}
    culprits = [_silent(rank, silent.get(rank), states.get(str(rank))) for rank in quiet[:8]]
    culprits += [place.words() for place in sorted(busy, key=lambda place: place.rank)[:8]]
    if (more := len(quiet) + len(busy) - len(culprits)) > 0:
        culprits.append(f"{more} more do not wait either")
    waits = [f"{_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''} in {what}" for what, ranks in waiting.items()]
    story = " while ".join(filter(None, ["; ".join(culprits), "; ".join(waits)]))
    told = [place.rank for place in busy] or sorted(places)
    stacks = ", ".join(str(log_of(rank)) for rank in told[:4])
    beside = f" (the silent ones have none; see the ends of {', '.join(str(log_of(rank)) for rank in quiet[:4])})" if quiet else ""
    return f"the run hangs: no progress for {timeout:g} s (cluster.timeout). {story}; stacks: {stacks}{beside}"


def unusual_state(process: int) -> str | None:
    """What keeps a process of this node from running, by the kernel; None where nothing does."""
    fields = _stat(process)
    return "gone" if fields is None else _STATES.get(fields[0])


def parent_of(process: int) -> int | None:
    """The process that started it, None if there is none."""
    fields = _stat(process)
    return None if fields is None else int(fields[1])


def _silent(rank: int, last: Place | None, state: str | None) -> str:
    if last is None:
        return f"rank {rank} gives no sign of life and never did"
    words = f"rank {rank} ({last.host}) gives no sign of life: it has been in {last.phase} for {time.time() - last.since:.0f} s"
    return f"{words} (process {last.process}, {state})" if state else f"{words} (process {last.process})"


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if len(ranks) == 1 else 's'} {words}"


def _stat(process: int) -> list[str] | None:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None

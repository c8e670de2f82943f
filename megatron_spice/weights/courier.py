"""Carries a bucket straight to the ranks that host engines, from those that have it (`weights/routes.py`).

What travels depends on the team. One rank that has all of a bucket makes it and sends it as it is to be, FP8 numbers and all;
it is received where the engine reads it. Ranks with slices send these, and the host makes the tensors: each packs its
slice of every sliced entry, one after the other. What all ranks of a team hold whole (norms, a router) goes from each in turn,
and only to hosts outside the team.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import Entry, hf_shapes, merge_ranks, split_for_rank
from megatron_spice.weights.plan import Bucket, Place, lay_out, put, size_of, views
from megatron_spice.weights.routes import Route

Own = Callable[[Entry], torch.Tensor]
"""This rank's parameter of an entry, contiguous, as it is to be sent."""


def is_whole(entry: Entry) -> bool:
    """Whether tensor parallelism leaves the entry in one piece."""
    return entry.kind == "replicated" or entry.expert is not None


def merge(
    entries: Sequence[Entry], slices: Callable[[Entry], Sequence[torch.Tensor]], architecture: ModelArchitecture,
    into: Mapping[str, torch.Tensor],
) -> None:  # fmt: skip
    """Makes the Hugging Face tensors of all slices of each entry, and puts them into a bucket's views."""
    for entry in entries:
        for name, tensor in merge_ranks(entry, slices(entry), architecture).items():
            put(into, name, tensor)


class Courier:
    """One rank's part in carrying buckets of numbers like `sample` (its type and device), until the last of a plan. All ranks make
    one together.

    Its memory for what is on the way is used again from bucket to bucket: fresh host memory costs a page fault every 4 KiB.
    """

    def __init__(self, architecture: ModelArchitecture, sample: torch.Tensor) -> None:
        self.bytes_received = 0
        self._architecture = architecture
        self._sample = sample
        self._rank = dist.get_rank()
        self._memory: dict[Any, torch.Tensor] = {}
        # NCCL sets a group up at its first collective, which all ranks must join; a single send would wait for ever.
        dist.all_reduce(torch.zeros(1, device=sample.device))

    def carry(
        self, bucket: Bucket, route: Route, own: Own, flat: torch.Tensor | None, places: Mapping[str, Place]
    ) -> None:
        """Sends what others need of this rank, and fills `flat` (uint8, `places` in it) if this rank is a host, else None.

        Returns when both are done: nothing is waited for before all of it is under way.
        """
        me = self._rank
        team = next((team for team in route.values() if me in team), ())
        waiting = [host for host, senders in route.items() if me in senders and host != me]
        if len(team) == 1:
            if waiting or flat is not None:
                flat = self._scratch("made", size_of(places)) if flat is None else flat
                merge(bucket.entries, lambda entry: [own(entry)], self._architecture, views(flat, places))
            self._exchange([(dist.isend, flat, host) for host in waiting])
            return
        moves = [(dist.isend, self._packed(bucket, team, host in team, own), host) for host in waiting]
        if flat is None:
            self._exchange(moves)
        elif len(route[me]) == 1:
            self._exchange([*moves, (dist.irecv, flat, route[me][0])])
        else:
            self._receive_slices(bucket, route[me], own, views(flat, places), moves)

    def _receive_slices(
        self, bucket: Bucket, team: tuple[int, ...], own: Own, into: Mapping[str, torch.Tensor], moves: list[Any]
    ) -> None:
        received: dict[int, dict[str, torch.Tensor]] = {self._rank: {}}
        for member in team:
            if member != self._rank:
                layout = self._packing(bucket, team, member, self._rank in team)
                packed = self._scratch(member, size_of(layout))
                received[member] = views(packed, layout)
                moves.append((dist.irecv, packed, member))
        self._exchange(moves)

        def slices(entry: Entry) -> list[torch.Tensor]:
            name = entry.hf[0]
            if is_whole(entry):
                return [own(entry)] if self._rank in team else [parts[name] for parts in received.values() if name in parts]
            return [own(entry) if member == self._rank else received[member][name] for member in team]

        merge(bucket.entries, slices, self._architecture, into)

    def _packed(self, bucket: Bucket, team: tuple[int, ...], inside: bool, own: Own) -> torch.Tensor:
        """What this rank sends to a host inside or outside its team."""
        layout = self._packing(bucket, team, self._rank, inside)
        packed = self._scratch(("packed", inside), size_of(layout))
        into = views(packed, layout)
        for entry in bucket.entries:
            if entry.hf[0] in into:
                into[entry.hf[0]].copy_(own(entry))
        return packed

    def _packing(self, bucket: Bucket, team: tuple[int, ...], member: int, inside: bool) -> dict[str, Place]:
        """Where each entry, by the first of its Hugging Face names, lies in what `member` sends."""
        turn = team.index(member)
        sent = [
            entry for number, entry in enumerate(bucket.entries)
            if not is_whole(entry) or (not inside and number % len(team) == turn)
        ]  # fmt: skip
        shapes = {entry.hf[0]: _slice_shape(entry, self._architecture, len(team)) for entry in sent}
        return lay_out(shapes, self._sample.dtype)

    def _scratch(self, purpose: Any, num_bytes: int) -> torch.Tensor:
        kept = self._memory.get(purpose)
        if kept is None or kept.numel() < num_bytes:
            kept = self._memory[purpose] = torch.empty(num_bytes, dtype=torch.uint8, device=self._sample.device)
        return kept[:num_bytes]

    def _exchange(self, moves: Sequence[tuple[Any, torch.Tensor, int]]) -> None:
        moves = [move for move in moves if move[1].numel()]
        self.bytes_received += sum(tensor.numel() for verb, tensor, _ in moves if verb is dist.irecv)
        if moves:
            for request in dist.batch_isend_irecv([dist.P2POp(*move) for move in moves]):
                request.wait()


@cache
def _slice_shape(entry: Entry, architecture: ModelArchitecture, size: int) -> tuple[int, ...]:
    """The shape of what one of `size` tensor-parallel ranks holds of an entry."""
    whole = [torch.empty(shape, device="meta") for shape in hf_shapes(entry, architecture).values()]
    return tuple(split_for_rank(entry, whole, architecture, 0, size).shape)

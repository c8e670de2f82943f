"""From the ranks' slices back to whole Hugging Face tensors, a bucket at a time.

Carrying the plan (`weights/plan.py`) out in one of two ways:

    to all ranks    the owning ranks gather their slices over the tensor-parallel group, make the Hugging Face tensors and put
                    them into one buffer; an expert's goes to the other expert ranks of the stage by a broadcast over the expert
                    group, and every stage's to the other stages by one over the pipeline group. Two facts of Megatron's groups
                    make these two broadcasts enough: every expert group has all experts of its stage, and every pipeline group
                    one rank of each stage
    to the hosts    of engines, where not all ranks are: each gets slices, or what one rank has whole, straight from those that
                    have them (`weights/routes.py`). The others receive nothing, and make nothing that nobody asks of them

Beside its own weights a rank never holds more than a few times a bucket. Weights that are to be quantised are so when they
are whole, by whoever makes the tensors: their blocks are then the same in every layout, and where one rank has all of a
tensor only its FP8 numbers travel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.courier import Courier, Own, is_whole, merge
from megatron_spice.weights.names import Entry
from megatron_spice.weights.plan import Bucket, Place, lay_out, plan_buckets, size_of, views
from megatron_spice.weights.routes import Route, Seat, plan_route
from megatron_spice.weights.stage import Key, Stage

Change = Callable[[torch.Tensor], torch.Tensor]
Memory = Callable[[int, torch.dtype], torch.Tensor]
"""Gives a flat tensor of so many numbers of a type, which a bucket is then put into."""


class Gatherer:
    """Carries a plan out on every rank; all ranks must iterate it together.

    Args:
        bucket_elements: numbers in a bucket.
        tensor_group, pipeline_group, expert_group: this rank's groups of each kind; None for one rank. Experts are shared
            out over `expert_group`, whose ranks are of one pipeline stage.
        seats: all ranks, in order; None: all host an engine.
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        stage: Stage,
        bucket_elements: int,
        tensor_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        expert_group: dist.ProcessGroup | None = None,
        seats: Sequence[Seat] | None = None,
    ) -> None:
        self.architecture = architecture
        self.stage = stage
        self.plan = plan_buckets(architecture, stage.layout, bucket_elements)
        self.tensor_group = tensor_group
        self.pipeline_group = pipeline_group
        self.expert_group = expert_group
        self.bytes_received = 0
        """From other ranks, since the start."""
        self.is_host = seats is None or seats[dist.get_rank()].is_host
        self._routes: dict[tuple[int, int | None], Route] | None = None
        if seats is not None and not all(seat.is_host for seat in seats):
            self._routes = {owner: plan_route(seats, *owner) for owner in {bucket.owner for bucket in self.plan}}

    @torch.no_grad()
    def buckets(
        self,
        parameters: Mapping[Key, torch.Tensor],
        changes: Mapping[Key, Change] | None = None,
        memory: Memory | None = None,
        quantised: Collection[str] = (),
        hosts_only: bool = False,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields dictionaries of whole Hugging Face tensors: views of one flat buffer, from `memory` if it is given.

        Args:
            parameters: this rank's (`weights/stage.py` says under which keys).
            changes: what is to be made of some of them before they are gathered.
            memory: where buckets are put, on this host; None: fresh memory of the parameters' device.
            quantised: Hugging Face names that become FP8 numbers and factors (`weights/plan.py`).
            hosts_only: ranks without an engine yield nothing; they must iterate all the same.
        """
        sample = next(iter(parameters.values()))
        own = self._own(parameters, changes or {})
        courier = Courier(self.architecture, sample) if hosts_only and self._routes is not None else None
        for bucket in self.plan:
            places = lay_out(bucket.shapes, sample.dtype, quantised)
            if courier is None or self.is_host:
                size = size_of(places)
                fresh = memory is None
                flat = torch.empty(size, dtype=torch.uint8, device=sample.device) if fresh else memory(size, torch.uint8)
            if courier is None:
                self._fill(bucket, own, flat, places)
            else:
                before = courier.bytes_received
                courier.carry(bucket, self._routes[bucket.owner], own, flat if self.is_host else None, places)
                self.bytes_received += courier.bytes_received - before
            if courier is None or self.is_host:
                yield views(flat, places)

    def _fill(self, bucket: Bucket, own: Own, flat: torch.Tensor, places: Mapping[str, Place]) -> None:
        """Fills a bucket on every rank."""
        here = bucket.stage == self.stage.rank
        made = here and bucket.expert_rank in (None, self.stage.expert_rank)
        if made:
            merge(bucket.entries, lambda entry: self._slices(entry, own(entry)), self.architecture, views(flat, places))
        else:
            self.bytes_received += flat.numel()
        if here and bucket.expert_rank is not None:
            _broadcast(flat, bucket.expert_rank, self.expert_group)
        _broadcast(flat, bucket.stage, self.pipeline_group)

    def _slices(self, entry: Entry, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        if is_whole(entry) or self.tensor_group is None or self.tensor_group.size() == 1:
            return [mine]
        slices = [torch.empty_like(mine) for _ in range(self.tensor_group.size())]
        dist.all_gather(slices, mine, group=self.tensor_group)
        self.bytes_received += (len(slices) - 1) * mine.nbytes
        return slices

    def _own(self, parameters: Mapping[Key, torch.Tensor], changes: Mapping[Key, Change]) -> Own:
        def own(entry: Entry) -> torch.Tensor:
            key = self.stage.key(entry, parameters)
            mine = changes[key](parameters[key]) if key in changes else parameters[key]
            return mine.detach().contiguous()

        return own


def _broadcast(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    """Fills `tensor` on every rank of the group with what rank `rank` of it has."""
    if group is not None and group.size() > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, rank), group=group)

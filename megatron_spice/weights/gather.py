"""From the ranks' slices back to whole Hugging Face tensors, a bucket at a time.

The plan is made once, in plain Python: entries in table order, dealt to their owners (a pipeline stage and, for experts, an
expert rank of it) and cut into buckets of a given size. Carrying a bucket out: the owning ranks gather their slices over
the tensor-parallel group, make the Hugging Face tensors and flatten them into one buffer; an expert's goes to the other
expert ranks of the stage by a broadcast over the expert group, and every stage's to the other stages by one over the
pipeline group. So every rank holds each bucket for a moment, and beside its own weights never more than a few times a
bucket. Two facts of Megatron's groups make these two broadcasts enough: every expert group has all experts of its stage, and
every pipeline group one rank of each stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.names import Entry, hf_shapes, merge_ranks, table
from megatron_spice.weights.stage import Key, Stage


Change = Callable[[torch.Tensor], torch.Tensor]
Memory = Callable[[int, torch.dtype], torch.Tensor]
"""Gives a flat tensor of so many numbers of a type, which a bucket is then put into."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries that travel together, and the shapes of the tensors they become, in order.

    `stage` is the pipeline stage that has them; `expert_rank` the expert rank that has them there, None if all do.
    """

    stage: int
    expert_rank: int | None
    entries: tuple[Entry, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def plan_buckets(architecture: ModelArchitecture, layout: ParallelLayout, max_elements: int) -> list[Bucket]:
    """Buckets of at most `max_elements` numbers (a single larger tensor is a bucket of its own)."""
    stage = Stage(0, layout, 0, architecture.num_experts)
    owned: dict[tuple[int, int | None], list[Entry]] = {}
    for entry in table(architecture):
        rank, expert_rank = stage.owner(entry)
        shared = entry.expert is None or layout.expert == 1
        owned.setdefault((rank, None if shared else expert_rank), []).append(entry)
    buckets = []
    for owner, entries in owned.items():
        taken: list[Entry] = []
        shapes: dict[str, tuple[int, ...]] = {}
        total = 0
        for entry in entries:
            more = hf_shapes(entry, architecture)
            count = sum(math.prod(shape) for shape in more.values())
            if taken and total + count > max_elements:
                buckets.append(Bucket(*owner, tuple(taken), shapes))
                taken, shapes, total = [], {}, 0
            taken.append(entry)
            shapes |= more
            total += count
        buckets.append(Bucket(*owner, tuple(taken), shapes))
    return buckets


class Gatherer:
    """Carries a plan out on every rank; all ranks must iterate it together.

    Args:
        bucket_elements: numbers in a bucket.
        tensor_group, pipeline_group, expert_group: this rank's groups of each kind; None for one rank. Experts are shared
            out over `expert_group`, whose ranks are of one pipeline stage.
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        stage: Stage,
        bucket_elements: int,
        tensor_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        expert_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.architecture = architecture
        self.stage = stage
        self.plan = plan_buckets(architecture, stage.layout, bucket_elements)
        self.tensor_group = tensor_group
        self.pipeline_group = pipeline_group
        self.expert_group = expert_group

    @torch.no_grad()
    def buckets(
        self,
        parameters: Mapping[Key, torch.Tensor],
        changes: Mapping[Key, Change] | None = None,
        memory: Memory | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields dictionaries of whole Hugging Face tensors: views of one flat buffer, from `memory` if it is given.

        Args:
            parameters: this rank's (`weights/stage.py` says under which keys).
            changes: what is to be made of some of them before they are gathered.
            memory: where buckets are put, on this host; None: fresh memory of the parameters' device.
        """
        sample = next(iter(parameters.values()))
        for bucket in self.plan:
            here = bucket.stage == self.stage.rank
            if memory is None:
                flat = torch.empty(bucket.num_elements, dtype=sample.dtype, device=sample.device)
            else:
                flat = memory(bucket.num_elements, sample.dtype)
            if here and bucket.expert_rank in (None, self.stage.expert_rank):
                self._merge(bucket, parameters, changes or {}, _views(flat, bucket.shapes))
            if here and bucket.expert_rank is not None:
                _broadcast(flat, bucket.expert_rank, self.expert_group)
            _broadcast(flat, bucket.stage, self.pipeline_group)
            yield _views(flat, bucket.shapes)

    def _merge(
        self,
        bucket: Bucket,
        parameters: Mapping[Key, torch.Tensor],
        changes: Mapping[Key, Change],
        views: Mapping[str, torch.Tensor],
    ) -> None:
        """Fills the bucket's tensors from slices of this stage."""
        for entry in bucket.entries:
            key = self.stage.key(entry, parameters)
            mine = changes[key](parameters[key]) if key in changes else parameters[key]
            for name, tensor in merge_ranks(entry, self._slices(entry, mine), self.architecture).items():
                views[name].copy_(tensor)

    def _slices(self, entry: Entry, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        mine = mine.detach().contiguous()
        whole = entry.kind == "replicated" or entry.expert is not None
        if whole or self.tensor_group is None or self.tensor_group.size() == 1:
            return [mine]
        slices = [torch.empty_like(mine) for _ in range(self.tensor_group.size())]
        dist.all_gather(slices, mine, group=self.tensor_group)
        return slices


def _broadcast(tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    """Fills `tensor` on every rank of the group with what rank `rank` of it has."""
    if group is not None and group.size() > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, rank), group=group)


def _views(flat: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), flat.split(sizes))}

"""From the ranks' slices back to whole Hugging Face tensors, a bucket at a time.

The plan is made once, in plain Python: entries in table order, cut into buckets of a given size that do not mix pipeline
stages. Carrying a bucket out: the owning stage gathers its slices over the tensor-parallel group and makes the Hugging
Face tensors, flattened into one buffer; the buffer goes to the other stages by one broadcast over the pipeline group. So
every rank holds each bucket for a moment, and beside its own weights never more than a few times a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.weights.names import Entry, hf_shapes, merge_ranks, table
from megatron_spice.weights.stage import Stage


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries that travel together, and the shapes of the tensors they become, in order."""

    owner: int
    entries: tuple[Entry, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def plan_buckets(architecture: ModelArchitecture, pipeline_size: int, max_elements: int) -> list[Bucket]:
    """Buckets of at most `max_elements` numbers (a single larger tensor is a bucket of its own)."""
    stage = Stage(0, pipeline_size, architecture.num_layers)
    buckets: list[Bucket] = []
    for entry in table(architecture):
        shapes = hf_shapes(entry, architecture)
        count = sum(math.prod(shape) for shape in shapes.values())
        owner = stage.owner(entry)
        last = buckets[-1] if buckets else None
        if last and last.owner == owner and last.num_elements + count <= max_elements:
            buckets[-1] = Bucket(owner, (*last.entries, entry), {**last.shapes, **shapes})
        else:
            buckets.append(Bucket(owner, (entry,), shapes))
    return buckets


class Gatherer:
    """Carries a plan out on every rank; all ranks must iterate it together."""

    def __init__(
        self,
        architecture: ModelArchitecture,
        stage: Stage,
        bucket_elements: int,
        tensor_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.architecture = architecture
        self.stage = stage
        self.plan = plan_buckets(architecture, stage.size, bucket_elements)
        self.tensor_group = tensor_group
        self.pipeline_group = pipeline_group

    @torch.no_grad()
    def buckets(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yields dictionaries of whole Hugging Face tensors: views of one flat buffer, valid until the next."""
        sample = next(iter(parameters.values()))
        for bucket in self.plan:
            if bucket.owner == self.stage.rank:
                tensors: dict[str, torch.Tensor] = {}
                for entry in bucket.entries:
                    name = self.stage.local_name(entry)
                    tensors.update(merge_ranks(entry, self._slices(entry, parameters[name]), self.architecture))
                flat = torch.cat([tensors[name].reshape(-1) for name in bucket.shapes])
            else:
                flat = torch.empty(bucket.num_elements, dtype=sample.dtype, device=sample.device)
            if self.pipeline_group is not None and self.pipeline_group.size() > 1:
                source = dist.get_global_rank(self.pipeline_group, bucket.owner)
                dist.broadcast(flat, source, group=self.pipeline_group)
            yield _views(flat, bucket.shapes)

    def _slices(self, entry: Entry, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        mine = mine.detach().contiguous()
        if entry.kind == "replicated" or self.tensor_group is None or self.tensor_group.size() == 1:
            return [mine]
        slices = [torch.empty_like(mine) for _ in range(self.tensor_group.size())]
        dist.all_gather(slices, mine, group=self.tensor_group)
        return slices


def _views(flat: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), flat.split(sizes))}

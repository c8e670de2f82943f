"""What one rank holds of the name table, under which names: its chunks of layers and its share of the experts.

Parameters go about as `{(chunk, name): parameter}`: `chunk` numbers the chunks of layers on this rank from 0 and `name` is
Megatron's in that chunk, where layers, and in them experts, are numbered from 0 again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_spice.config.layout import ParallelLayout
from megatron_spice.weights.names import Entry

Key = tuple[int, str]


def stage_parameters(chunks: Sequence[torch.nn.Module]) -> dict[Key, torch.nn.Parameter]:
    """The parameters of a rank's chunks, in the model's order."""
    return {(index, name): parameter for index, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()}


@dataclass(frozen=True, slots=True)
class Stage:
    """Pipeline stage `rank` of a layout, and the share of the experts with number `expert_rank`."""

    rank: int
    layout: ParallelLayout
    expert_rank: int = 0
    num_experts: int | None = None

    def keys(self, entry: Entry) -> list[Key]:
        """The keys that the entry's parameter may have on this rank, one of them; empty where it is not held."""
        last = len(self.layout.chunk_layers) - 1
        if entry.stage == "layer":
            chunk = self.layout.chunk_of(entry.layer)
            local = self._local_expert(entry)
            if chunk % self.layout.pipeline != self.rank or local is None:
                return []
            layer = entry.layer - self.layout.layers_of(chunk).start
            return [(chunk // self.layout.pipeline, name.format(layer=layer, expert=local)) for name in entry.names]
        found: list[Key] = []
        if self.rank == 0 and entry.stage in ("first", "both"):
            found = [(0, name) for name in entry.names]
        if self.rank == last % self.layout.pipeline:
            if entry.stage == "last":
                found = [(self.layout.virtual - 1, name) for name in entry.names]
            elif entry.stage == "both" and last > 0:
                found = [(self.layout.virtual - 1, "output_layer.weight")]  # the last chunk's copy of a tied embedding
        return found

    def key(self, entry: Entry, parameters: Collection[Key]) -> Key | None:
        """The entry's key among this rank's parameters; None where it is not held.

        Raises:
            ValueError: it should be held and is not among them.
        """
        keys = self.keys(entry)
        for key in keys:
            if key in parameters:
                return key
        if keys:
            names = " or ".join(name for _, name in keys)
            raise ValueError(f"chunk {keys[0][0]} of stage {self.rank} has no parameter {names}, which the name table expects")
        return None

    def owner(self, entry: Entry) -> tuple[int, int]:
        """The pipeline stage that speaks for the entry (the only one that holds it, or the first), and the expert rank
        that does so there (0 for what all its ranks hold)."""
        last = len(self.layout.chunk_layers) - 1
        chunk = self.layout.chunk_of(entry.layer) if entry.stage == "layer" else last if entry.stage == "last" else 0
        return chunk % self.layout.pipeline, 0 if entry.expert is None else entry.expert // self._local_experts

    def held(self, entries: Iterable[Entry], parameters: Collection[Key]) -> Iterator[tuple[Entry, Key]]:
        """The entries this rank holds, with their keys. Raises ValueError as `key` does."""
        for entry in entries:
            key = self.key(entry, parameters)
            if key is not None:
                yield entry, key

    @property
    def _local_experts(self) -> int:
        """Experts on each rank: consecutive ones."""
        return self.num_experts // self.layout.expert

    def _local_expert(self, entry: Entry) -> int | None:
        """The expert's number on this rank (0 for what is no expert), None where another rank has it."""
        if entry.expert is None:
            return 0
        rank, local = divmod(entry.expert, self._local_experts)
        return local if rank == self.expert_rank else None

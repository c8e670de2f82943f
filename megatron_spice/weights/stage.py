"""What one pipeline stage holds of the name table, under which local names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_spice.weights.names import Entry


@dataclass(frozen=True, slots=True)
class Stage:
    """Pipeline stage `rank` of `size`, each with an equal share of `num_layers` layers."""

    rank: int
    size: int
    num_layers: int

    @property
    def first_layer(self) -> int:
        return self.rank * (self.num_layers // self.size)

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers // self.size

    def local_name(self, entry: Entry) -> str | None:
        """The entry's parameter name on this stage (layers are numbered from 0 on each), None where it is not held."""
        is_first, is_last = self.rank == 0, self.rank == self.size - 1
        if entry.stage == "layer":
            if not self.first_layer <= entry.layer < self.end_layer:
                return None
            return entry.megatron.replace(f".{entry.layer}.", f".{entry.layer - self.first_layer}.", 1)
        if entry.stage == "both" and is_last and not is_first:
            return "output_layer.weight"  # the last stage's copy of a tied embedding
        held = is_first if entry.stage in ("first", "both") else is_last
        return entry.megatron if held else None

    def owner(self, entry: Entry) -> int:
        """The stage that speaks for the entry: the only one that holds it, or the first."""
        if entry.stage == "layer":
            return entry.layer // (self.num_layers // self.size)
        return self.size - 1 if entry.stage == "last" else 0

    def held(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
        """The entries this stage holds, with their local names."""
        for entry in entries:
            name = self.local_name(entry)
            if name is not None:
                yield entry, name

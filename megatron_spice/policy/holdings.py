"""The part of the policy that this rank saves, as blocks of Megatron's tensors.

Which tensors there are, what they are called and which part of each this rank's parameters are is Megatron's own description
of the model (`sharded_state_dict`). Which numbers of a parameter this rank owns is the distributed optimiser's division: the
range whose float32 weight and moments it keeps. The same range of the weight itself is its to save.

What is loaded is described by Megatron alone, with keys and shapes as its sharding "fully_reshardable" has them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer

from megatron_spice.checkpoint.pieces import Holdings, Piece, blocks
from megatron_spice.policy.optimizer import SHARDING, parts_of

STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Spot:
    """A shard that the numbers from `start` on of a flat parameter are."""

    start: int
    shard: ShardedTensor

    def pieces(self, first: int, flat: torch.Tensor, key: str) -> Iterator[Piece]:
        """The blocks of the shard that `flat`, the parameter's numbers from `first` on, has; as of a tensor named `key`."""
        shard, num_prepended = self.shard, self.shard.prepend_axis_num
        start = max(first, self.start)
        stop = min(first + flat.numel(), self.start + shard.data.numel())
        for offsets, sizes in blocks(shard.local_shape, start - self.start, stop - self.start):
            there = [base + offset for base, offset in zip(shard.global_offset[num_prepended:], offsets)]
            numbers = flat[start - first :][: torch.Size(sizes).numel()]
            start += numbers.numel()
            yield Piece(
                key, tuple(shard.global_shape), (*shard.global_offset[:num_prepended], *there), (1,) * num_prepended + sizes, numbers
            )


def holdings_of(model_state: dict[str, Any], optimizer: MegatronOptimizer, with_optimizer: bool) -> Holdings:
    """What this rank has to save, over the memory that it is in.

    Args:
        model_state: the sharded description of all chunks.
    """
    described = list(nested_values(model_state))
    shards = {base.data: base for base in described if not isinstance(base, ShardedObject)}
    pieces: list[Piece] = []
    for part in parts_of(optimizer):
        for parameter, first, stop in _owned(part):
            spots = list(_spots(parameter, shards[parameter]))
            flat = {"": parameter.detach().view(-1)[first:stop]}
            if with_optimizer:
                kept = part._get_main_param_and_optimizer_states(parameter)
                flat |= {f"optimizer.state.{name}.": kept[name].detach().view(-1) for name in STATES}
            pieces += [p for prefix, numbers in flat.items() for s in spots for p in s.pieces(first, numbers, prefix + s.shard.key)]
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                shards.pop(parameter, None)
    for tensor, base in shards.items():  # buffers: nobody's in the optimiser
        if is_main_replica(base.replica_id):
            numbers = tensor.detach().reshape(-1)
            pieces += [piece for spot in _spots(tensor, base) for piece in spot.pieces(0, numbers, spot.shard.key)]
    mine = [base for base in described if isinstance(base, ShardedObject) and is_main_replica(base.replica_id)]
    common = {"optimizer": _common(optimizer)} if with_optimizer else {}
    return Holdings(pieces, {base.unique_key: _serialised(base.data) for base in mine}, common)


def _owned(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Each parameter of which this rank owns numbers in a distributed optimiser, the first of them and the one after the last."""
    for by_dtype in part.gbuf_ranges:
        for in_buckets in by_dtype.values():
            for in_bucket in in_buckets:
                for parameter, ranges in in_bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _spots(tensor: torch.Tensor, base: ShardedTensor | ShardedTensorFactory) -> Iterator[_Spot]:
    """Where the shards of a parameter lie in it, those of which some data-parallel rank is to save its own part.

    A replica's number has the data-parallel rank last; each of these owns another range, so only what stands before it counts.
    """
    shards = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
    for shard in shards:
        assert shard.data.is_contiguous() and shard.data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), (
            f"{shard.key} is saved as something else than its numbers in order"
        )
        if is_main_replica((*shard.replica_id[:-1], 0)):
            yield _Spot(shard.data.storage_offset() - tensor.storage_offset(), shard)


def _common(optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """Megatron's description of an optimiser without its tensors: groups, and with them the count of steps."""
    chain: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chain) > 1:
        optimizer._synchronize_steps()
    kind = {"param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}
    parts = {index: part.state_dict() | kind for index, part in enumerate(chain) if not part.is_stub_optimizer}
    return parts if len(chain) > 1 else parts[0]


def _serialised(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save([data], stream)
    return stream.getvalue()

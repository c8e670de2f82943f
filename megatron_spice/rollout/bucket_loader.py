"""How an engine takes a bucket of weights: SGLang's own `custom_weight_loader`, named at the engine's start.

A bucket comes as one "named tensor": the memory that the sender fills, under a name that says in JSON which tensor lies
where. SGLang's own formats for this would do, but for two things. They let go of the memory after each bucket, and mapping
shared memory anew takes a page fault for every 64 KiB of it: 0.25 GiB are mapped in 8 to 15 ms, as long as copying them
takes. So memory that the sender uses again stays mapped, the newest `KEPT` pieces, as many as a `buckets.Parcel` has. And
nobody looks whether what was loaded is what was sent: with "check" the parameters are compared with it, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOADER = "megatron_spice.rollout.bucket_loader.load"
KEPT = 2
FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip

_kept: dict[int, torch.UntypedStorage] = {}


def load(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Loads one bucket into the model.

    Raises:
        ValueError: the model's parameters are not what was sent.
    """
    import torch

    [(layout, flat)] = named_tensors
    about = json.loads(layout)
    if about["lasting"] and not flat.is_cuda:
        _keep(flat.untyped_storage())
    tensors = [
        (name, flat[start:end].view(getattr(torch, dtype)).view(shape)) for name, dtype, shape, start, end in about["tensors"]
    ]
    model.load_weights(tensors)
    if about["check"]:
        compared, different = compare(model, tensors)
        if different:
            raise ValueError(f"{len(different)} of {compared} parameters are not what was sent, such as {different[:3]}")
        print(f"compared {compared} parameters with what was sent: equal", flush=True)


def compare(model: torch.nn.Module, tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[int, list[str]]:
    """How many parameters could be compared with the tensors sent, and which of them differ.

    Left out is what the engine holds in another form: slices of a tensor-parallel rank, fused experts, tied weights.
    """
    import torch

    parameters = dict(model.named_parameters())
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        owner, _, linear = module.rpartition(".")
        fused = f"{owner}.{FUSED[linear]}.{leaf}" if linear in FUSED else name
        parts.setdefault(fused if fused in parameters else name, []).append(tensor)
    compared, different = 0, []
    for name, sent in parts.items():
        parameter = parameters.get(name)
        rows = sum(len(tensor) for tensor in sent)
        if parameter is None or parameter.dtype != sent[0].dtype or parameter.shape[1:] != sent[0].shape[1:]:
            continue
        if len(parameter) != rows and not ("embed_tokens" in name or "lm_head" in name):  # those two may be padded
            continue
        if len(parameter) < rows:
            continue
        compared += 1
        loaded = parameter.detach()[:rows].split([len(tensor) for tensor in sent])
        if not all(torch.equal(_bits(here), _bits(there)) for here, there in zip(loaded, sent)):
            different.append(name)
    return compared, different


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as whole numbers: equal means equal bits, whatever a type makes of them."""
    import torch

    return tensor.contiguous().view(torch.uint8)


def _keep(memory: torch.UntypedStorage) -> None:
    """As long as it is kept, unpickling the next handle of this memory finds it instead of mapping it again."""
    _kept[memory.data_ptr()] = _kept.pop(memory.data_ptr(), memory)
    while len(_kept) > KEPT:
        del _kept[next(iter(_kept))]

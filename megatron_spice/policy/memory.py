"""Device memory: what the policy gives up while the engines play.

Sleeping takes the storages away from under the tensors (`shelf.py`), so nothing has to be rebuilt, and the code is the
same on every device. What torch then holds of freed memory goes back to the driver, and sleeping ends when the driver
shows it as free. Waking begins when the driver shows as much as it takes (`cluster/free_memory.py`).

    gradients   Megatron's float32 gradient buffers: nothing to copy, they start from zero
    all         besides them the optimiser's state (float32 weights and moments) and, after the sync, the weights

SGLang's engines sleep by torch_memory_saver. The policy does not need what that adds (addresses that never change, for
captured CUDA graphs) and would pay for it: it wants everything allocated inside a region of its own, while Megatron
allocates parameters and gradients together, and it refuses expandable segments.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_spice.cluster import free_memory, host_memory
from megatron_spice.policy.optimizer import parts_of
from megatron_spice.policy.shelf import Shelf

GIB = 2**30
RELEASE_TIMEOUT = 10.0  # seconds; another process may have taken the memory as soon as it was free


class Sleeper:
    """Puts one rank's part of the policy to sleep and wakes it, bit for bit.

    `sleep` may keep the weights awake, to be sent to the engines; `sleep_weights` then gives them up too. With the level
    "gradients" weights never sleep. All three return metrics: GiB that became free (on CUDA as the driver counts them,
    cached memory of torch included) and seconds.
    """

    def __init__(
        self,
        wrapped: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        device: torch.device,
        level: Literal["auto", "gradients", "all"],
    ) -> None:
        """
        Args:
            level: "auto" is "all" on CUDA and "gradients" on a CPU, where copies would lie in the same memory.
        """
        self.wrapped = list(wrapped)
        self.optimizer = optimizer
        self.device = device
        self.level = ("all" if device.type == "cuda" else "gradients") if level == "auto" else level
        self.awake = True
        self.weights_awake = True
        self._weights = Shelf(device)
        self._state = Shelf(device)

    def describe(self) -> str:
        """For people: what sleeps, and where it goes."""
        if self.level == "gradients":
            return "gradients only"
        where = "pinned host memory" if self.device.type == "cuda" else "host memory"
        return f"gradients, optimizer state and weights (copies in {where})"

    def sleep(self, keep_weights: bool) -> dict[str, float]:
        """Gives up gradients, and with "all" the optimiser's state; the weights too unless they are to be kept."""
        assert self.awake, "the policy is already asleep"
        self.awake = False
        metrics = self._given_up("slept", "sleep", self._give_up_training_state)
        return metrics if keep_weights else metrics | self.sleep_weights()

    def sleep_weights(self) -> dict[str, float]:
        """Gives up the weights after `sleep(keep_weights=True)`; they stay at the level "gradients"."""
        assert not self.awake and self.weights_awake, "weights sleep last, and once"
        if self.level == "gradients":
            return {}
        self.weights_awake = False
        return self._given_up("slept_weights", "sleep_weights", self._give_up_weights)

    def wake(self) -> dict[str, float]:
        """Takes everything back that sleeps, on CUDA as soon as there is room. Gradients are zero afterwards.

        Raises:
            NotFree: there is none, although the engines should sleep.
        """
        assert not self.awake, "the policy is already awake"
        start = time.perf_counter()
        free = self._wait_for_room()
        self._weights.take_back()
        self._state.take_back()
        for buffer in self._buffers():
            buffer.grad_data.untyped_storage().resize_(buffer.numel * buffer.grad_data.element_size())
            buffer.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.awake = self.weights_awake = True
        return {"memory/free_for_policy_gib": free / GIB, "memory/wake_seconds": time.perf_counter() - start}

    def lying(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a contiguous tensor's numbers are: in host memory while they sleep, otherwise in the tensor itself."""
        copies = (shelf.lying(tensor) for shelf in (self._weights, self._state))
        return next((copy for copy in copies if copy is not None), tensor)

    def _wait_for_room(self) -> int:
        """Bytes that are free for what sleeps, once it fits."""
        if self.device.type == "cpu":
            return free_memory.free_on_host()
        gradients = sum(buffer.numel * buffer.grad_data.element_size() for buffer in self._buffers())
        needed = self._weights.num_bytes + self._state.num_bytes + gradients
        what = "the policy wakes, and engines that sleep hold memory or something else does (nvidia-smi shows what)"
        free_memory.wait_until_free(needed, free_memory.free_for_torch, free_memory.TIMEOUT, what)
        return free_memory.free_for_torch()

    def _give_up_training_state(self) -> int:
        given_up = 0
        for buffer in self._buffers():
            storage = buffer.grad_data.untyped_storage()
            given_up += storage.nbytes()
            storage.resize_(0)
        if self.level == "all":
            weights = {weight.untyped_storage().data_ptr() for weight in self.weight_buffers()}
            state = [t for t in optimizer_tensors(self.optimizer) if t.untyped_storage().data_ptr() not in weights]
            given_up += self._state.put(state)
            self._drop_quantized_weights()
        return given_up

    def _give_up_weights(self) -> int:
        self._drop_quantized_weights()
        return self._weights.put(self.weight_buffers())

    def _given_up(self, what: str, verb: str, give_up: Callable[[], int]) -> dict[str, float]:
        start = time.perf_counter()
        num_bytes = _released(give_up) if self.device.type == "cuda" else give_up()
        if self.device.type == "cpu":
            host_memory.give_back_freed_memory()
        return {f"memory/{what}_gib": num_bytes / GIB, f"memory/{verb}_seconds": time.perf_counter() - start}

    def _drop_quantized_weights(self) -> None:
        """Transformer Engine keeps FP8 copies of weights from one micro-batch to the next, and makes those anew that are
        not there."""
        for chunk in self.wrapped:
            for module in chunk.modules():
                if copies := getattr(module, "_fp8_workspaces", None):
                    copies.clear()

    def _buffers(self) -> Iterator[Any]:
        for chunk in self.wrapped:
            yield from chunk.buffers
            yield from chunk.expert_parallel_buffers

    def weight_buffers(self) -> list[torch.Tensor]:
        """What the weights of this rank lie in."""
        return [buffer.param_data for buffer in self._buffers()]


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Float32 weights and moments (and, in float32, the weights themselves), wherever they are."""
    for part in parts_of(optimizer):
        inner = part.optimizer
        # With `policy.optimizer_offload` the work is done by several optimisers inside the one.
        for each in (inner, *getattr(inner, "sub_optimizers", ())):
            for group in each.param_groups:
                yield from group["params"]
            for state in each.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _released(give_up: Callable[[], int]) -> int:
    """Runs `give_up` and hands what torch has cached back to the driver. Returns the bytes by which the device's free
    memory grew, after waiting for as many as torch let go of."""
    free, reserved = free_memory.free_on_device(), torch.cuda.memory_reserved()
    give_up()
    free_memory.give_back_unused()
    expected = free + reserved - torch.cuda.memory_reserved()
    with contextlib.suppress(free_memory.NotFree):  # whoever needs it waits for it again
        free_memory.wait_until_free(expected, free_memory.free_on_device, RELEASE_TIMEOUT, "the policy sleeps")
    return free_memory.free_on_device() - free

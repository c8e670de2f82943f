"""Pushing the policy's weights into the engines, and proof that they arrived.

Order, for every engine this rank hosts: open a weight-update session, send each bucket as it is gathered, close the
session with the new version, and read the version back. Every name of the table must have been sent. With verification
on, a fixed text is then scored by both sides (the policy first: its weights may sleep by the time the engines can): a
converter bug or a bucket changed on its way shows as log-probabilities that differ, before a single rollout is wasted
on it. At an engine's first update it also compares its parameters with what was sent (`rollout/bucket_loader.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_spice.cluster.whereabouts import moved
from megatron_spice.rollout.crew import Crew


# Largest mean |policy - engine| log-probability taken for rounding: bfloat16 kernels of two systems differ in order, and an
# FP8 policy rounds activations that its engines do not. Measured with SmolLM2-135M on the CPU: 0.17 to 0.19 between FP8 and
# bf16 on the probe text (0.24 to 0.28 where engines get weights that are not rounded), 0.46 to 6.3 when one matrix or norm
# has its rows shifted by one.
TOLERANCE = {"fp32": 0.02, "bf16": 0.15, "fp8": 0.4}


class SyncMismatch(RuntimeError):
    """An engine does not compute what the policy computes."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """How a sync went: seconds of the transfer, bytes sent to each engine, mean |policy - engine| on the probe text, and
    bytes a second of a plain copy, the ceiling."""

    seconds: float
    num_bytes: int
    difference: float | None
    copy_rate: float

    def metrics(self) -> dict[str, float]:
        gib = self.num_bytes / 2**30
        rate = gib / max(self.seconds, 1e-9)
        copy = self.copy_rate / 2**30
        metrics = {
            "sync/gib": gib, "sync/push_seconds": self.seconds, "sync/gib_per_second": rate,
            "sync/copy_gib_per_second": copy, "sync/times_a_copy": copy / rate if gib else 0.0,
        }  # fmt: skip
        if self.difference is not None:
            metrics["sync/difference"] = self.difference
        return metrics


def copy_rate(device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes a second that reach another process at best: what is sent is written once and read once, so two copies on this
    device; the fastest of a few. (On an accelerator of 256 MiB, of which its cache holds little.)"""
    num_bytes = num_bytes or (2**26 if device.type == "cpu" else 2**28)
    source, between, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(3))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        between.copy_(source)
        target.copy_(between)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def push(
    buckets: Callable[[], Iterator[dict[str, torch.Tensor]]],
    names: Collection[str],
    crew: Crew,
    version: str,
) -> tuple[float, int]:
    """Sends all buckets to the engines of this rank. All ranks call it together: gathering is collective, so it goes on
    when an engine fails, which its crew then knows. While a bucket is on its way the next one is gathered.

    Args:
        buckets: gathers the weights anew at each call; a bucket stays as it is until the one after the next is asked for.
        names: the tensors that together are the whole model; a rank without engines may be given none of them.

    Returns:
        Seconds taken and bytes of one copy of the weights.

    Raises:
        SyncMismatch: a tensor was not sent, so the engines would go on with an old one.
    """
    start = time.perf_counter()
    num_bytes = 0
    missing = set(names)
    with ThreadPoolExecutor(1, initializer=_like_this_thread()) as sender:
        sending: Future[None] = sender.submit(crew.each, lambda engine: engine.begin_update())
        for bucket in buckets():
            num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())
            missing.difference_update(bucket)
            moved()
            sending.result()
            sending = sender.submit(_send, crew, list(bucket.items()))
        sending.result()
    if missing and (crew.engines or num_bytes):
        raise SyncMismatch(f"{len(missing)} of {len(names)} tensors were not sent, among them {sorted(missing)[:3]}")
    crew.each(lambda engine: engine.end_update(version))
    dist.barrier()
    return time.perf_counter() - start, num_bytes


def _send(crew: Crew, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    crew.each(lambda engine: engine.update_bucket(named_tensors))


def _like_this_thread() -> Callable[[], None]:
    """Gives another thread this one's device: each thread begins with the first."""
    if not torch.cuda.is_available():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


def verify(ours: Sequence[float], crew: Crew, probe_ids: Sequence[int], tolerance: float) -> float:
    """Compares policy and engines on a fixed text. All ranks call it together and all learn the outcome.

    Args:
        ours: the policy's log-probabilities of `probe_ids[1:]`, taken while its weights were awake.

    Returns:
        The largest mean absolute difference over the engines of all ranks.

    Raises:
        SyncMismatch: it passes `tolerance`.
    """
    ours_t = torch.tensor(ours)
    scores: list[list[float]] = []
    crew.each(lambda engine: scores.append(engine.score(list(probe_ids))))
    worst = 0.0
    for score in scores:
        difference = (torch.tensor(score) - ours_t).abs().mean().item()
        worst = max(worst, difference if difference == difference else float("inf"))
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, worst)
    if max(everyone) > tolerance:
        rank = everyone.index(max(everyone))
        raise SyncMismatch(
            f"after the weight sync the engine of rank {rank} differs from the policy by {everyone[rank]:.4f} in mean "
            f"log-probability on the probe text (rollout.sync_tolerance {tolerance}): the engine's weights are not the "
            "policy's. Look at the newest change to weights/ or at the engine's log; rollout.verify_sync=false skips this"
        )
    return max(everyone)

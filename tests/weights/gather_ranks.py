"""Ranks that load slices of given tensors and gather them again, for test_gather.py."""

from __future__ import annotations

import time
from typing import Any

import torch


def gather(jobs: list[tuple[Any, Any]], hosts: list[list[int]], bucket_elements: int, quantised_layers: list[int]) -> list[dict[str, Any]]:
    """For each (architecture, layout): this rank's parameters filled from random tensors and gathered, on all ranks and then
    only on each of the sets of hosts, the last of them with the weights of some layers quantised.

    Returns:
        The number of parameters held, what came to all ranks, and a list of what came with each set of hosts: the buckets'
        names in order, the bytes received and the seconds, and the tensors that are not bit for bit what they should be.
    """
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))

    from megatron.core import parallel_state

    from megatron_spice.config.schema import RolloutConfig
    from megatron_spice.policy import parallel
    from megatron_spice.weights.fp8 import quantise
    from megatron_spice.weights.gather import Gatherer
    from megatron_spice.weights.load import fill
    from megatron_spice.weights.names import hf_shapes, split_for_rank, table
    from megatron_spice.weights.plan import quantised_names
    from megatron_spice.weights.routes import Seat
    from megatron_spice.weights.stage import Stage

    results = []
    with distributed.process_group(here, 120):
        for architecture, layout in jobs:
            place = parallel.initialize(layout, seed=0, timeout=60)
            stage = Stage(place.pipeline_rank, layout, place.expert_rank, architecture.num_experts)
            entries = table(architecture)
            generator = torch.Generator().manual_seed(1)
            source = {
                name: torch.randn(shape, generator=generator)
                for entry in entries
                for name, shape in hf_shapes(entry, architecture).items()
            }
            parameters = {}
            for entry in entries:
                for key in stage.keys(entry)[:1]:
                    tensors = [source[name] for name in entry.hf]
                    part = split_for_rank(entry, tensors, architecture, place.tensor_rank, layout.tensor)
                    parameters[key] = torch.full_like(part, float("nan"))
            fill(parameters, source, entries, architecture, stage, place.tensor_rank, layout.tensor)
            groups = [
                parallel_state.get_tensor_model_parallel_group(),
                parallel_state.get_pipeline_model_parallel_group(),
                parallel_state.get_expert_model_parallel_group(),
            ]
            names = quantised_names(architecture, quantised_layers)
            halved = {name: tensor for name, tensor in source.items() if name not in names}
            for name in names:
                halved[name], halved[f"{name}_scale_inv"] = quantise(source[name])
            everyone = parallel.seats(here, place, RolloutConfig(engines_per_node=here.world_size))
            one = _carried(Gatherer(architecture, stage, bucket_elements, *groups, everyone), parameters, source)
            found = []
            for number, chosen in enumerate(hosts):
                seats = [Seat(s.rank, s.node, s.stage, s.expert_rank, s.team, s.rank in chosen) for s in everyone]
                gatherer = Gatherer(architecture, stage, bucket_elements, *groups, seats)
                last = number == len(hosts) - 1
                found.append(_carried(gatherer, parameters, halved if last else source, names if last else ()))
            results.append({"held": len(parameters), "all": set(source), "quantised": set(halved), "everyone": one, "hosts": found})
            parallel.shutdown()
    return results


def _carried(gatherer: Any, parameters: Any, expected: dict[str, torch.Tensor], quantised: Any = ()) -> dict[str, Any]:
    torch.distributed.barrier()
    order, wrong, start = [], [], time.perf_counter()
    for bucket in gatherer.buckets(parameters, quantised=quantised, hosts_only=True):
        order.append(list(bucket))
        wrong += [name for name, tensor in bucket.items() if not _same(tensor, expected[name])]
    return {"order": order, "wrong": wrong, "bytes": gatherer.bytes_received, "seconds": time.perf_counter() - start}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))

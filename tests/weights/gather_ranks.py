"""Ranks that load slices of given tensors and gather them again, for test_gather.py."""

from __future__ import annotations

from typing import Any

import torch


def gather(jobs: list[tuple[Any, Any]], bucket_elements: int) -> list[dict[str, Any]]:
    """For each (architecture, layout): this rank's parameters filled from random tensors and gathered.

    Returns:
        The number of parameters held, the buckets' names in order, and whether every tensor came back bit for bit.
    """
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))

    from megatron.core import parallel_state

    from megatron_spice.policy import parallel
    from megatron_spice.weights.gather import Gatherer
    from megatron_spice.weights.load import fill
    from megatron_spice.weights.names import hf_shapes, split_for_rank, table
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
            gatherer = Gatherer(
                architecture,
                stage,
                bucket_elements,
                parallel_state.get_tensor_model_parallel_group(),
                parallel_state.get_pipeline_model_parallel_group(),
                parallel_state.get_expert_model_parallel_group(),
            )
            order, wrong = [], []
            for bucket in gatherer.buckets(parameters):
                order.append(list(bucket))
                wrong += [name for name, tensor in bucket.items() if not torch.equal(tensor, source[name])]
            results.append({"held": len(parameters), "order": order, "wrong": wrong, "all": set(source)})
            parallel.shutdown()
    return results

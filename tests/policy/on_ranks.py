"""What policy tests do on ranks: one process start for many layouts, since importing Megatron takes most of a test's time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch


def in_layouts(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job builds a policy and does what the job asks: scores, a few updates, gathered weights, save or load.

    A job: {"model": folder, "overrides": {room: {key: value}}, "trajectories": [...], "updates": n, "score": ids,
    "gather": bool, "save": folder, "load": folder, "sequences": bool (attention by sequence lengths),
    "rollout": bool, "audit": bool, "fit": [...], "fits": n}. Gathered weights come back from rank 0, their digest and those of the ends of a tied embedding from all.
    """
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 120):
        from megatron_spice.policy import parallel

        results, before = [], None
        for job in jobs:
            # Jobs of one layout share its process groups: gloo's threads of destroyed ones stay, and add up.
            settings = job.get("overrides", {}).get("policy", {})
            degrees = {key: value for key, value in settings.items() if key.endswith("parallel_size")}
            if before not in (None, degrees):
                parallel.shutdown()
            before = degrees
            try:
                results.append(_one(job, here))
            except Exception as error:
                raise RuntimeError(f"in the job {Path(job['model']).parent.name}: {job.get('overrides')}") from error
        return results


def _one(job: dict[str, Any], here: Any) -> dict[str, Any]:
    from policy_weights import hf_buckets, save_tensors

    from megatron_spice.checkpoint.checkpointer import load_tensors
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy.model_config import Backend
    from megatron_spice.policy.policy import Policy

    model = Path(job["model"])
    rooms: dict[str, Any] = {
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"},
        "policy": {"model": model, "precision": "fp32", "learning_rate": 1e-2},
        "rollout": {"bucket_mb": 1}, "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
    }  # fmt: skip
    for room, values in job.get("overrides", {}).items():
        rooms[room] = {**rooms.get(room, {}), **values}
    backend = Backend(sequence_attention=_sequence_attention()) if job.get("sequences") else None
    policy = Policy(Config.model_validate(rooms), read_architecture(model), here, backend)
    result: dict[str, Any] = {}
    compares = policy.policy_config.kl_coefficient is not None
    if compares or "load" not in job:
        policy.load_hf(model)
    if compares:
        policy.keep_reference()
    if "load" in job:
        load_tensors(policy, Path(job["load"]), with_optimizer=job.get("with_optimizer", True))
    if "score" in job:
        result["score"] = policy.score(job["score"])
    result["updates"] = [policy.update(job["trajectories"]) for _ in range(job.get("updates", 0))]
    if "fit" in job:
        result["fit"] = [policy.fit(job["fit"]) for _ in range(job["fits"])]
    if "save" in job:
        weights = Path(job["save"]) / "weights"
        if here.rank == 0:
            weights.mkdir(parents=True)
        torch.distributed.barrier()
        save_tensors(policy, weights, with_optimizer=True)
    if job.get("gather"):
        weights = {name: tensor.float().clone().numpy() for bucket in hf_buckets(policy) for name, tensor in bucket.items()}
        result["digest"] = _digest(*(weights[name] for name in sorted(weights)))
        result["embeddings"] = {(policy.placement.tensor_rank, digest) for digest in _embeddings(policy)}
        if here.rank == 0:
            result["weights"] = weights
    if job.get("rollout"):
        result["rollout_weights"] = {n: t.float().clone().numpy() for bucket in policy.rollout_buckets() for n, t in bucket.items()}
    if job.get("audit"):
        result["audit"] = policy.audit_lines()
    if job.get("updates_after"):
        result["updates"] += [policy.update(job["trajectories"]) for _ in range(job["updates_after"])]
    return result


def _embeddings(policy: Any) -> list[str]:
    """Digests of this rank's part of the embedding, and of what predicts with it if it is tied."""
    ends = ("word_embeddings.weight", "output_layer.weight") if policy.architecture.tied_embeddings else ()
    return [_digest(p.detach().float().numpy()) for (_, name), p in policy.parameters.items() if name.endswith(ends)]


def _digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _sequence_attention() -> type:
    """What Transformer Engine's attention does with Megatron's THD format, sequence by sequence: its own needs a GPU."""
    from megatron.core.transformer.module import MegatronModule

    class SequenceAttention(MegatronModule):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config=config)

        def forward(self, query_tnd: Any, key_tgd: Any, value_tgd: Any, mask: Any, packed_seq_params: Any, **rest: Any) -> Any:
            assert mask is None and packed_seq_params.qkv_format == "thd"
            starts = packed_seq_params.cu_seqlens_q.tolist()
            assert starts[-1] == query_tnd.shape[0] and packed_seq_params.max_seqlen_q >= max(map(int.__sub__, starts[1:], starts))
            parts = []
            for start, end in zip(starts, starts[1:]):
                query, key, value = (x[start:end].transpose(0, 1) for x in (query_tnd, key_tgd, value_tgd))
                parts.append(
                    torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                )
            return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)

    return SequenceAttention

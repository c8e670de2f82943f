"""SGLang's own server settings that a recipe's `rollout.server` may not hold, because this program decides them.

Which these are is a matter of the device: an attention backend, say, is a free choice on a GPU and none on a CPU. Where a recipe
leaves the device open (`cluster.device: auto`) only those that are taken on both are refused here; the rest when ranks start.
"""

from __future__ import annotations

from megatron_spice.config.schema import RolloutConfig

ALWAYS = frozenset({
    "model_path", "load_format", "dtype", "host", "port", "nccl_port", "tp_size", "mem_fraction_static", "max_running_requests",
    "context_length", "random_seed", "skip_server_warmup", "custom_weight_loader", "enable_deterministic_inference", "log_level",
    "log_level_http", "api_key",
})  # fmt: skip
ON = {
    "cpu": frozenset({
        "device", "attention_backend", "sampling_backend", "disable_overlap_schedule", "max_total_tokens", "sleep_on_idle",
        "dp_size", "detokenizer_worker_num",
    }),
    "cuda": frozenset({"base_gpu_id", "enable_memory_saver"}),
}  # fmt: skip
QUANTIZED = "json_model_override_args"


def server_key_problems(rollout: RolloutConfig, device: str) -> list[str]:
    """What `rollout.server` holds and may not, a line each. `device`: "cpu", "cuda" or "auto" (not known yet)."""
    taken = ALWAYS | ON.get(device, frozenset()) | ({QUANTIZED} if rollout.weights == "fp8" else frozenset())
    return [
        f"rollout.server.{key}={rollout.server[key]} is set by this program itself: leave it out"
        for key in sorted(taken & rollout.server.keys())
    ]

"""config.json of published models, as far as shapes go, and a chat template, so that recipes for them can be planned without their
weights."""

from __future__ import annotations

import json
from pathlib import Path

_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
_LLAMA3 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": _LLAMA3_ROPE,
}  # fmt: skip


def _sizes(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> dict:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn, "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES = {
    "qwen3-4b": {**_QWEN3, **_sizes(36, 2560, 32, 9728, True)},
    "qwen3-8b": {**_QWEN3, **_sizes(36, 4096, 32, 12288, False)},
    "qwen3-32b": {**_QWEN3, **_sizes(64, 5120, 64, 25600, False)},
    "qwen3-30b-a3b": {
        **_QWEN3, **_sizes(48, 2048, 32, 6144, False), "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
    },
    "octothinker-3b": {**_LLAMA3, **_sizes(28, 3072, 24, 8192, True)},
    "octothinker-8b": {**_LLAMA3, **_sizes(32, 4096, 32, 14336, False)},
    "llama3-70b": {**_LLAMA3, **_sizes(80, 8192, 64, 28672, False)},
}  # fmt: skip


def add_model(folder: Path, name: str) -> Path:
    """A model folder with that model's config.json and some chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def add_corpus(folder: Path, name: str) -> Path:
    """A corpus folder with what a plan reads of it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format": 2, "tokenizer": {"vocab_size": SHAPES[name]["vocab_size"]}, "options": {"max_tokens": 5992}}
    manifest["sources"] = [{"name": label, "documents": 1, "tokens": 9, "passages": 1} for label in ("mathematics", "general")]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

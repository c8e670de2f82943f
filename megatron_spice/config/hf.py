"""A model's architecture, read from the `config.json` that Hugging Face models carry.

Every room that must know a model's shape (layout checks, model construction, the weight name table) reads it from here,
so there is one place that knows what `config.json` calls things. Families differ in what they leave unsaid: Qwen2 has
query/key/value biases, Qwen3 normalises queries and keys, Qwen3-MoE has experts, and none of them writes it down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spice.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` implies without saying it in `config.json`."""

    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None = None
    """Head width where `config.json` has none; None: hidden size / heads."""
    experts: bool = False
    """Every layer's MLP is a mixture of experts."""


FAMILIES = {
    "llama": Family(qkv_bias=False, qk_norm=False),
    "qwen2": Family(qkv_bias=True, qk_norm=False),
    "qwen3": Family(qkv_bias=False, qk_norm=True, head_dim=128),
    "qwen3_moe": Family(qkv_bias=False, qk_norm=True, experts=True),
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The one rope scaling that Megatron-Core's rotary embedding computes, whatever its `factor`: Llama 3.1's and 3.2's."""


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """The shape of a decoder-only transformer, in Megatron's words where they differ from Hugging Face's.

    `num_query_groups` is the number of key/value heads, `ffn_hidden_size` the width of the gated MLP, `vocab_size` the
    unpadded vocabulary. `rope_scaling` is None for plain rotary embeddings, else the parameters as the model gives them.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int | None = None
    """Experts of each layer's mixture; None: a dense model."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    """Width of one expert's gated MLP (`ffn_hidden_size` is then unused by the layers)."""
    normalize_expert_weights: bool = True
    """The chosen experts' weights add up to one (Hugging Face: `norm_topk_prob`)."""

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str = "config.json") -> ModelArchitecture:
        """Reads a parsed `config.json`; `source` names it in errors.

        Raises:
            ConfigError: an unknown `model_type`, a missing or absurd number, or a feature that no room implements.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise ConfigError(
                f"{source}: model_type={model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[model_type]
        numbers = _Numbers(config, source)
        heads = numbers.read("num_attention_heads")
        hidden = numbers.read("hidden_size")
        rope = _rope_parameters(config)
        architecture = cls(
            family=model_type,
            num_layers=numbers.read("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=numbers.read("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=numbers.read("num_key_value_heads", heads),
            head_dim=numbers.read("head_dim", family.head_dim or max(1, hidden // heads)),
            vocab_size=numbers.read("vocab_size"),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=_scaling(rope),
            max_position_embeddings=numbers.read("max_position_embeddings"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            **(_experts(config, numbers) if family.experts else {}),
        )
        problems = numbers.problems + _unsupported(config, source)
        if family.experts:
            problems += _unsupported_experts(config, architecture, source)
        if architecture.num_attention_heads % architecture.num_query_groups:
            problems.append(
                f"{source}: num_key_value_heads={architecture.num_query_groups} does not divide "
                f"num_attention_heads={architecture.num_attention_heads}; copy the file again from the model's source"
            )
        if problems:
            raise ConfigError(problems)
        return architecture


class _Numbers:
    """Reads counts; collects what is missing or not a positive whole number, and goes on with 1 in its place."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config, self.source = config, source
        self.problems: list[str] = []

    def read(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        if value is None:
            value = default
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        found = "is missing" if value is None else f"is {value!r}"
        self.problems.append(f"{self.source}: {name} {found}; a positive whole number is needed")
        return 1


def _experts(config: dict[str, Any], numbers: _Numbers) -> dict[str, Any]:
    """A mixture's fields; transformers 5 writes `num_local_experts` where older files say `num_experts`."""
    return {
        "num_experts": numbers.read("num_experts", config.get("num_local_experts")),
        "experts_per_token": numbers.read("num_experts_per_tok"),
        "expert_ffn_hidden_size": numbers.read("moe_intermediate_size"),
        "normalize_expert_weights": bool(config.get("norm_topk_prob", False)),
    }


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings: newer files say `rope_parameters`, older ones `rope_scaling` beside a plain `rope_theta`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(parameters)


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    return {"rope_type": kind, **{name: value for name, value in rope.items() if name not in ("rope_theta", "type")}}


def _unsupported(config: dict[str, Any], source: str) -> list[str]:
    """Features that would change the numbers and that the policy does not build: an error beats a wrong model."""
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"{source}: hidden_act={config['hidden_act']!r} is not supported; supported: silu")
    if config.get("mlp_bias"):
        problems.append(f"{source}: mlp_bias=true is not supported; supported: false")
    if config.get("model_type") != "qwen2" and config.get("attention_bias"):
        problems.append(f"{source}: attention_bias=true is not supported for {config.get('model_type')}; supported: false")
    if config.get("use_sliding_window"):
        problems.append(f"{source}: use_sliding_window=true is not supported; supported: false")
    scaling = _scaling(_rope_parameters(config))
    if scaling is not None and {name: scaling.get(name) for name in LLAMA3_ROPE} != LLAMA3_ROPE:
        problems.append(f"{source}: rope scaling {scaling} is not supported; supported: {LLAMA3_ROPE} with any factor")
    if config.get("quantization_config"):
        problems.append(f"{source}: quantised weights (quantization_config) are not supported; use the bf16 model")
    return problems


def _unsupported_experts(config: dict[str, Any], architecture: ModelArchitecture, source: str) -> list[str]:
    """Mixtures that the policy does not build: layers without experts among the others, and choices that cannot be made."""
    problems = []
    if config.get("mlp_only_layers"):
        problems.append(f"{source}: mlp_only_layers={config['mlp_only_layers']} is not supported; supported: []")
    if config.get("decoder_sparse_step", 1) != 1:
        problems.append(f"{source}: decoder_sparse_step={config['decoder_sparse_step']} is not supported; supported: 1")
    chosen, experts = architecture.experts_per_token, architecture.num_experts
    if chosen > experts:
        problems.append(
            f"{source}: num_experts_per_tok={chosen} is more than num_experts={experts}; copy the file again from the model's source"
        )
    if chosen == 1 and architecture.normalize_expert_weights:
        problems.append(
            f"{source}: num_experts_per_tok=1 with norm_topk_prob=true is not supported: the one expert's weight is always 1, "
            "so the router would learn nothing"
        )
    return problems


def hugging_face_folder(model: Path) -> Path:
    """The folder with `config.json` and the tokenizer: `model` itself, or `hf/` inside a converted checkpoint.

    Raises:
        ConfigError: there is no such folder; the message says which command makes one.
    """
    for folder in (model, model / "hf"):
        if (folder / "config.json").is_file():
            return folder
    found = "is not there" if not model.exists() else "holds neither config.json nor hf/config.json"
    raise ConfigError(
        f"policy.model={model} {found}; give a Hugging Face folder, or make a checkpoint with "
        f"`python tools/convert_checkpoint.py hf-to-megatron HUGGING_FACE_FOLDER {model}`"
    )


def read_architecture(model: Path) -> ModelArchitecture:
    """The architecture of the model at `model` (a Hugging Face folder or a converted checkpoint).

    Raises:
        ConfigError: nothing readable there, or an architecture that is not supported.
    """
    return ModelArchitecture.from_config(*read_config(hugging_face_folder(Path(model))))


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The parsed `config.json` of a Hugging Face folder, and its path for messages.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; copy it again from the model's source") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not an object; copy it again from the model's source")
    return config, str(path)

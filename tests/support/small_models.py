"""Random small models of every supported family, as Hugging Face folders, and the trajectories tests train them on."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import torch

from megatron_spice.cluster.platform import STUBS
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.game.records import Trajectory

VOCAB = 403  # odd on purpose: it has to be padded

# Two architectures without weights, whose numbers all differ so that mixing them up shows.
DENSE = ModelArchitecture(
    family="qwen2", num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=8, num_query_groups=4,
    head_dim=6, vocab_size=301, norm_epsilon=1e-5, rope_theta=1e4, rope_scaling=None, max_position_embeddings=64,
    tied_embeddings=False, qkv_bias=True, qk_norm=True,
)  # fmt: skip
MIXTURE = dataclasses.replace(
    DENSE, family="qwen3_moe", qkv_bias=False, num_experts=6, experts_per_token=2, expert_ffn_hidden_size=20
)

TEXT = "Ghana exports gold and cocoa. Its capital is Accra. Which river feeds the lake? The Volta does, in the east. "


def import_transformers() -> None:
    """Makes transformers importable in the tests' own process: without CUDA its torchvision needs the stand-ins first."""
    if not torch.cuda.is_available():
        if str(STUBS) not in sys.path:
            sys.path.insert(0, str(STUBS))
        import triton  # noqa: F401
    import transformers  # noqa: F401


def make_model(
    folder: Path,
    family: str,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rope_scaling: bool = False,
    **sizes: object,
) -> Path:
    """4 layers, width 64, 4 heads in 2 groups; a mixture has 8 experts, 2 for each token. `sizes` are keys of `config.json`
    that shall be otherwise, such as `num_hidden_layers=5` or `num_key_value_heads=4`."""
    import_transformers()
    import transformers

    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[family]
    settings: dict[str, object] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": tied, "initializer_range": 0.15,
    }  # fmt: skip
    if family in ("qwen3", "qwen3_moe"):
        settings["head_dim"] = 24
    if family == "qwen3_moe":
        settings |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    if rope_scaling:  # long wavelengths exist only with a long base
        settings["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**settings | sizes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():  # norms and biases that differ from their defaults, so that mixing them up shows
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def some_trajectories(groups: int = 4, size: int = 3, seed: int = 0) -> list[Trajectory]:
    """Groups of both roles with uneven lengths; advantages sum to zero in each group, one group is all equal."""
    rng = random.Random(seed)
    found = []
    for number in range(groups):
        role = "challenger" if number % 2 == 0 else "reasoner"
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(2, 20)))
        for member in range(size):
            completion = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9)))
            logprobs = tuple(-rng.random() * 3 for _ in completion)
            advantage = 0.0 if number == 1 else (member - (size - 1) / 2) * 0.5
            found.append(Trajectory(role, prompt, completion, logprobs, advantage, reward=0.0))
    return found


def add_tokenizer(folder: Path) -> Path:
    """Gives a model folder a byte-level BPE tokenizer of 400 tokens, with ChatML control tokens."""
    import_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|pad|>").save_pretrained(folder)
    return folder

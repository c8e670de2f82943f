"""A tiny random Llama with its own tokenizer, and one real SGLang server for all tests that do not harm it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.supervisor import SglangEngine
from tests.rollout.processes import processes, shared_memory

if not torch.cuda.is_available():
    from megatron_spice.rollout.sglang_server import STUBS

    sys.path.insert(0, str(STUBS))
    import triton  # noqa: F401  transformers cannot be imported before it

TEXT = "Ghana exports gold and cocoa. Its capital is Accra. Which river feeds the lake? The Volta does, in the east. "


@pytest.fixture(scope="session")
def new_engine(tiny_model: Path) -> Callable[..., SglangEngine]:
    """Makes an engine that is not launched: `new_engine(log path, model=the tiny one, threads=1)`."""

    def make(log: Path, model: Path = tiny_model, threads: int = 1, **more: Any) -> SglangEngine:
        small = RolloutConfig(threads=threads, max_total_tokens=4096, max_running_requests=32, request_timeout=60.0)
        return SglangEngine(small, Topology(), "fp32", model, log, load_format="auto", **more)

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 2 layers, width 64, grouped-query attention, about 500 tokens, float32."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokens.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|pad|>")

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
            initializer_range=0.2, bos_token_id=0, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(
    new_engine: Callable[..., SglangEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangEngine]:
    """A running server with the tiny model's weights; leave it awake, idle and with those weights.

    Its orderly end is a test too: nothing of it may be left.
    """
    served = new_engine(tmp_path_factory.mktemp("logs") / "engine.log")
    served.launch()
    try:
        served.wait_ready()
        yield served
        group = served.pid
        assert group is not None
        shared = shared_memory(*processes(group))
    finally:
        served.close()
    assert not processes(group) and not [path for path in shared if path.exists()]

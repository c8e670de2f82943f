"""Servers that write the tasks: one whose model the given tokenizer cannot be the tokenizer of is refused before a run begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from standing_server import standing
from tiny_tokenizer import write_tokenizer

from megatron_spice.challenger import engines_beside
from megatron_spice.cluster.topology import Topology
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config
from megatron_spice.corpus.tokenizer import TextTokenizer

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.yaml"
SIZES = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def of(folder: Path, url: str, *more: str) -> tuple[Config, TextTokenizer]:
    """A recipe whose policy's model has 300 ids, of which its tokenizer uses 260."""
    write_tokenizer(folder / "ours")
    (folder / "ours" / "config.json").write_text(json.dumps({**SIZES, "vocab_size": 300}))
    told = ["game.fixed_challenger=true", "game.no_corpus=true", f"rollout.challenger.engines=[{url}]"]
    config = load_config(QUICKSTART, [f"policy.model={folder / 'ours'}", *told, *more])
    return config, TextTokenizer.from_dir(folder / "ours")


def test_a_server_of_another_vocabulary_needs_its_own_tokenizer(tmp_path, one_rank):
    """Every larger one knows the policy's ids, as other words."""
    with standing() as server:
        config, tokenizer = of(tmp_path, server.url)
        for vocabulary in (151936, 301, 299, 100):
            server.vocabulary = vocabulary
            with pytest.raises(ConfigError, match="policy.model, which has 300 ids, .*give its model's in rollout.challenger.tokenizer"):
                engines_beside(config, Topology(), [0], tokenizer, lambda: False)
        server.vocabulary = 300
        [engine] = engines_beside(config, Topology(), [0], tokenizer, lambda: False)
        assert engine.url == server.url

        given = write_tokenizer(tmp_path / "theirs", "theirs" * 9, 264)
        config, tokenizer = of(tmp_path, server.url, f"rollout.challenger.tokenizer={given}")
        server.vocabulary = 151936
        assert engines_beside(config, Topology(), [0], tokenizer, lambda: False)
        server.vocabulary = 263
        with pytest.raises(ConfigError, match="does not know token 263 of the tokenizer"):
            engines_beside(config, Topology(), [0], tokenizer, lambda: False)

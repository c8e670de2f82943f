"""Servers that run already: which tokenizer they are asked with, and that another model behind the same address is another player."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from standing_server import Standing, standing
from tiny_tokenizer import write_tokenizer

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.crossplay.players import Player, check, players, served, with_tokenizers
from megatron_spice.crossplay.servers import meet
from megatron_spice.rollout.engine import EngineError

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml"
SIZES = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def server() -> Standing:
    with standing() as made:
        yield made


@pytest.fixture
def config(tmp_path) -> Config:
    """Of a model with 300 ids, of which its tokenizer uses 260."""
    write_tokenizer(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**SIZES, "vocab_size": 300}))
    return load_config(QUICKSTART, [f"policy.model={tmp_path / 'ours'}", "game.challenger_max_tokens=64", "rollout.context_length=256"])


def of(folder: Path) -> str:
    return TextTokenizer.from_dir(folder).vocab_hash


def test_a_given_tokenizer_comes_before_the_servers_own_and_that_before_the_recipes(server, config, tmp_path):
    its, given = (write_tokenizer(tmp_path / name, name * 9, 264) for name in ("its", "given"))
    server.vocabulary = 300
    assert meet(server.url, "", config).tokenizer.vocab_hash == of(tmp_path / "ours"), "it does not say which it has"
    server.tokenizer = "Qwen/Qwen3-8B"
    assert meet(server.url, "", config).tokenizer.vocab_hash == of(tmp_path / "ours"), "which is no folder here"
    server.tokenizer = str(its)
    assert meet(server.url, "", config).tokenizer.vocab_hash == of(its)
    assert meet(server.url, str(given), config).tokenizer.vocab_hash == of(given)


@pytest.mark.parametrize("vocabulary", [299, 301, 151936])
def test_the_recipes_tokenizer_is_not_taken_for_another_vocabulary(server, config, vocabulary):
    server.vocabulary, server.tokenizer = vocabulary, "Qwen/Qwen3-8B"
    with pytest.raises(ValueError, match="Qwen/Qwen3-8B.*has 300 ids.*--tokenizer"):
        meet(server.url, "", config)


def test_a_tokenizer_with_ids_that_the_server_does_not_know_is_refused(server, config, tmp_path):
    server.vocabulary = 263
    given = write_tokenizer(tmp_path / "given", "given" * 9, 264)
    player = Player("qwen", server.url, str(given))
    with pytest.raises(ConfigError, match="qwen: .*does not know token 263.*--tokenizer"):
        with served(player, config, tmp_path, "cpu"):
            pass
    server.vocabulary = 264
    with served(player, config, tmp_path, "cpu") as (_, tokenizer):
        assert tokenizer.vocab_hash == of(given)


def test_other_weights_another_model_and_another_tokenizer_are_another_player(server, config, tmp_path):
    server.vocabulary = 300
    seen = [Player("qwen", server.url).identity(config)]
    server.weights = "7"
    seen.append(Player("qwen", server.url).identity(config))
    server.model = "models/llama"
    seen.append(Player("qwen", server.url).identity(config))
    seen.append(Player("qwen", server.url, str(write_tokenizer(tmp_path / "given", "given" * 9, 264))).identity(config))
    assert len(set(seen)) == 4 and "models/qwen, weights default" in seen[0]
    assert Player("other", server.url).identity(config) == seen[2], "a name is no part of it"


def test_a_server_that_is_not_there_is_no_player(config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match="server_info"):
        Player("gone", url).identity(config)


def test_tokenizers_are_given_by_name_and_only_to_servers(tmp_path):
    folder = write_tokenizer(tmp_path / "qwen")
    one, other = with_tokenizers(players("qwen=http://gpu7:1,late=runs/a"), [f"qwen={folder}"])
    assert (one.tokenizer, other.tokenizer) == (str(folder), "")
    check(one)
    for wrong in ("llama=x", "qwen", "qwen="):
        with pytest.raises(ValueError, match="NAME is one of qwen, late"):
            with_tokenizers([one, other], [wrong])
    with pytest.raises(ValueError, match="late: runs/a has its own tokenizer"):
        check(Player("late", "runs/a", str(folder)))
    with pytest.raises(ValueError, match="qwen: its tokenizer .*nowhere has no tokenizer.json"):
        check(Player("qwen", "http://gpu7:1", str(tmp_path / "nowhere")))

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture
def smollm2() -> dict[str, Any]:
    return dict(SMOLLM2)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe whose paths exist; keyword arguments replace whole sections, None takes one away."""

    def write(text: str | None = None, **sections: Any) -> Path:
        model, corpus = tmp_path / "model", tmp_path / "corpus"
        model.mkdir(exist_ok=True)
        corpus.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(SMOLLM2))
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
        manifest = {"tokenizer": {"vocab_size": 49152}, "options": {"max_tokens": 160}}
        (corpus / "manifest.json").write_text(json.dumps(manifest))
        tree = {
            "run": {"dir": str(tmp_path / "run")},
            "corpus": {"path": str(corpus)},
            "policy": {"model": str(model)},
            "cluster": {"ranks_per_node": 2},
            **sections,
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text if text is not None else yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
        return recipe

    return write

"""What is put together for a run, as far as it needs no ranks."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_spice.assemble import _spoken_to
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.loader import load_config


@pytest.mark.parametrize(("template", "tokenizer_config", "words"), [
    ("{{ raise_exception('system role not supported') }}", "{}", "system role not supported"),
    ("{% if %}", "{}", "cannot be read"),
    ("{{ messages[-1].content }}", "{", "tokenizer_config.json is not JSON"),
    (None, "{}", "no chat template"),
])  # fmt: skip
def test_a_model_that_cannot_be_asked_is_said_in_words(tmp_path, template, tokenizer_config, words):
    folder = write_tokenizer(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(tokenizer_config)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"run": {"dir": "run"}, "corpus": {"path": "corpus"}, "policy": {"model": str(folder)}}))
    config = load_config(recipe)
    with pytest.raises(ConfigError, match=f"policy.model={folder}: .*{words}"):
        _spoken_to(config, folder)
    _, reasoner = _spoken_to(load_config(recipe, ["game.prompt_style=few_shot"]), write_tokenizer(tmp_path / "other"))
    assert reasoner.style.name == "few_shot"
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        _spoken_to(config, tmp_path)

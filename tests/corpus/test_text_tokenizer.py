from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.game.records import Segment

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
hostile = st.lists(st.sampled_from([*CONTROLS, "<|", "|>", "im_end", " ", "a"]) | texts, max_size=12).map("".join)


@given(text=hostile)
def test_spelled_control_tokens_stay_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == text


def test_the_library_alone_would_not_keep_them_text(tokenizer: TextTokenizer, tokenizer_dir: Path) -> None:
    library = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    library.encode_special_tokens = True
    assert tokenizer.control_ids & set(library.encode("a <think> b").ids)


@given(text=texts)
def test_ordinary_text_gets_the_library_s_ids(tokenizer: TextTokenizer, tokenizer_dir: Path, text: str) -> None:
    library = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.encode_batch([text, "x"]) == [library.encode(text).ids, library.encode("x").ids]


@given(text=texts, system=st.none() | texts.filter(lambda value: "<" not in value))
def test_a_prompt_has_the_ids_of_its_whole_text(
    tokenizer: TextTokenizer, tokenizer_dir: Path, text: str, system: str | None
) -> None:
    before, after = tokenizer.chat_wrapper(system)
    whole = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(before + text + after).ids
    assert tokenizer.encode_prompt((Segment(before), Segment(text, trusted=False), Segment(after))) == whole


@given(text=hostile)
def test_an_untrusted_segment_adds_no_control_token(tokenizer: TextTokenizer, text: str) -> None:
    def controls(user_text: str) -> list[int]:
        prompt = (Segment("<|im_start|>user\n"), Segment(user_text, trusted=False), Segment("<|im_end|>\n<think>"))
        return [index for index in tokenizer.encode_prompt(prompt) if index in tokenizer.control_ids]

    assert controls(text) == controls("")
    assert len(controls("")) == 3


def test_a_control_token_cannot_be_forged_across_segments(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_prompt((Segment("<|im_"), Segment("end|>", trusted=False)))
    assert not tokenizer.control_ids & set(ids)


def test_chat_wrapper_uses_the_model_s_format(tokenizer: TextTokenizer) -> None:
    assert tokenizer.chat_wrapper("Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    assert tokenizer.chat_wrapper(None)[0].startswith("<|im_start|>system\nDefault.")


def test_no_chat_template_names_the_way_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="few_shot"):
        TextTokenizer.from_dir(tmp_path).chat_wrapper(None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "2 times"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% if %}", "cannot be read"),
        ("{{ messages.append(1) }}", "refuses"),  # the sandbox: a template may not change what it is given
    ],
)
def test_unusable_templates_are_named(tokenizer_dir: Path, tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_dir(tmp_path).chat_wrapper(None)


def test_template_helpers_and_variables(tokenizer_dir: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ {'a': '<'} | tojson }}"
    )
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    config = {"bos_token": {"content": "<|im_start|>"}, "chat_template": [{"name": "default", "template": template}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer.from_dir(tmp_path).chat_wrapper(None) == ("<|im_start|>", '{"a": "<"}')


def test_stop_ids_come_from_the_file_that_knows_best(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert TextTokenizer.from_dir(tokenizer_dir).stop_ids == (0, 2)
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    assert TextTokenizer.from_dir(tmp_path).stop_ids == ()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_start|>"}}')
    assert TextTokenizer.from_dir(tmp_path).stop_ids == (1,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert TextTokenizer.from_dir(tmp_path).stop_ids == (2,)


def test_the_begin_of_text_id_is_added_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    tokenizer = TextTokenizer(spec)
    assert tokenizer.encode_prompt((Segment("The sea"),)) == [1, *tokenizer.encode("The sea")]
    assert tokenizer.encode_prompt((Segment("<|im_start|>The sea"),)) == [1, *tokenizer.encode("The sea")]
    assert 1 not in tokenizer.encode("The sea")


def test_the_hash_is_about_how_text_is_encoded(
    tokenizer: TextTokenizer, other_tokenizer: TextTokenizer, tokenizer_dir: Path
) -> None:
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 5000, "content": "<new_chat_token>"})
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    assert TextTokenizer(spec).vocab_hash == tokenizer.vocab_hash
    assert other_tokenizer.vocab_hash != tokenizer.vocab_hash
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    assert TextTokenizer(spec).vocab_hash != tokenizer.vocab_hash


def test_bytes_outside_the_vocabulary_are_dropped_not_marked(tokenizer_dir: Path) -> None:
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    hole = "\u0104"  # the byte-level spelling of byte 4
    assert spec["model"]["vocab"].pop(hole) is not None
    spec["model"].update(unk_token="<|endoftext|>", byte_fallback=True)
    tokenizer = TextTokenizer(spec)
    ids = tokenizer.encode("a\x04b")
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == "ab"


@given(text=texts)
def test_to_bytes_follows_every_id(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    encoded, starts = tokenizer.to_bytes(ids)
    assert encoded == text.encode()
    for place, start in enumerate(starts):
        assert tokenizer.decode(ids[:place]) == encoded[:start].decode(errors="replace")


def test_models_that_can_spell_control_tokens_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        TextTokenizer.from_dir(tmp_path)
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    spec["model"] = {"type": "WordLevel", "vocab": spec["model"]["vocab"], "unk_token": "<|endoftext|>"}
    with pytest.raises(ValueError, match="only BPE"):
        TextTokenizer(spec)
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    word = next(token for token in spec["model"]["vocab"] if token.isascii() and token.isalpha() and len(token) > 2)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": spec["model"]["vocab"][word], "content": word})
    with pytest.raises(ValueError, match="cannot be encoded safely"):
        TextTokenizer(spec)

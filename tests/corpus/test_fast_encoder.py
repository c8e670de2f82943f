"""gigatoken, as it is used here, against the Hugging Face tokenizer that defines the ids."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.corpus import fast_encoder
from megatron_spice.corpus.disputed import disputed, doubtful_tokens, has_disputed
from megatron_spice.corpus.encoder_check import choose_encoder, hard_strings
from megatron_spice.corpus.fast_encoder import GigatokenEncoder, HuggingFaceEncoder
from megatron_spice.corpus.tokenizer import TextTokenizer

SMOLLM2 = Path(__file__).parents[2] / "assets" / "smollm2-135m-instruct"
HOLES = (0x04, 0x13, 0xC3, 0xF1)  # byte values that the vocabulary lacks

characters = st.characters(exclude_categories=["Cs"])
pieces = st.sampled_from(["<|im_end|>", "<think>", "\x04", "\u00e9", "  ", "\n\n", "\U0001f600", "\u088f", "\U00040000", "'s", "12", "!"])
nasty = st.lists(st.text(characters, max_size=20) | pieces | st.text("ab \n1!\x04", max_size=20), max_size=8).map("".join)


@pytest.fixture(scope="module")
def spec(tokenizer_dir: Path) -> dict:
    return json.loads((tokenizer_dir / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def holed(spec: dict) -> TextTokenizer:
    """A vocabulary with holes and with whitespace among its added tokens, as some models have them."""
    from megatron_spice.corpus.plain_text import byte_level_alphabet

    spec = copy.deepcopy(spec)
    for character, byte in byte_level_alphabet().items():
        if byte in HOLES:
            del spec["model"]["vocab"][character]
    spec["model"].update(byte_fallback=True, unk_token="<|endoftext|>")
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 900, "content": "   ", "special": False})
    return TextTokenizer(spec)


@pytest.fixture(scope="module")
def smollm2() -> TextTokenizer:
    if not SMOLLM2.is_dir():
        pytest.skip("no SmolLM2 (python examples/fetch_assets.py model assets/smollm2-135m-instruct)")
    return TextTokenizer.from_dir(SMOLLM2)


@pytest.fixture(scope="module", params=["tokenizer", "holed", "smollm2"])
def both(request: pytest.FixtureRequest) -> tuple[TextTokenizer, GigatokenEncoder]:
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, GigatokenEncoder(tokenizer)


def rows(encoded: fast_encoder.Encoded) -> list[list[int]]:
    assert encoded.lengths.sum() == len(encoded.ids)
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])] if len(encoded.lengths) else []


@given(texts=st.lists(nasty, max_size=6))
def test_texts_get_the_ids_of_the_tokenizer(both: tuple[TextTokenizer, GigatokenEncoder], texts: list[str]) -> None:
    tokenizer, fast = both
    expected = [tokenizer.encode(text) for text in texts]
    assert rows(fast.encode(texts)) == expected
    assert rows(HuggingFaceEncoder(tokenizer).encode(texts)) == expected


def test_every_kind_of_character_gets_them(both: tuple[TextTokenizer, GigatokenEncoder]) -> None:
    tokenizer, fast = both
    points = [p for p in range(0x32000) if unicodedata.category(chr(p)) not in ("Cs", "Lo", "Cn")]
    points += [p for p in range(3, 0x32000, 29) if unicodedata.category(chr(p)) in ("Lo", "Cn")]
    texts = [f"a{chr(p)}b {chr(p)}1 !{chr(p)}\n{chr(p)}'s" for p in points]
    assert len(texts) > 10_000
    slow, quick = HuggingFaceEncoder(tokenizer).encode(texts), fast.encode(texts)
    assert np.array_equal(slow.lengths, quick.lengths) and np.array_equal(slow.ids, quick.ids)


def test_hard_strings_hold_what_is_hard(holed: TextTokenizer) -> None:
    texts = list(hard_strings(holed))
    everything = "".join(texts)
    categories = {unicodedata.category(character) for character in everything}
    assert len(categories) == 29  # all but surrogates
    assert all(f" {text}" in everything for text in holed.added_texts)
    fast = GigatokenEncoder(holed)
    ids = fast._backend.encode_batch(texts, parallel=False).layout.content.data
    assert set(range(holed.vocab_size, holed.vocab_size + 3)) & set(ids.tolist()), "no missing byte is met"


def test_what_unicode_may_have_given_out_lately_is_left_to_the_library(smollm2: TextTokenizer) -> None:
    text = "a\u088fb \u088f1 !\u088f\n\u088f's \u088fx"
    assert has_disputed(text) and not has_disputed("\u00e9\u6771\U0001f600 plain")
    backend = GigatokenEncoder(smollm2)._backend
    raw = backend.encode_batch([text], parallel=False).layout.content.data
    assert raw.tolist() != smollm2.encode(text), "the libraries agree now: is this module still needed?"


@given(
    before=st.binary(max_size=3),
    point=st.sampled_from(np.flatnonzero(disputed()).tolist()),
    after=st.binary(max_size=3),
    data=st.data(),
)
def test_however_it_is_split_a_disputed_character_has_a_doubtful_token(
    before: bytes, point: int, after: bytes, data: st.DataObject
) -> None:
    character = chr(point).encode()
    cut = data.draw(st.integers(1, len(character)))
    tokens = [before + character[:cut], character[cut:] + after]
    assert doubtful_tokens(tokens).any()
    assert not doubtful_tokens(["\u00e9".encode(), b"plain", b"\xa9", "\U0001f600".encode(), b""]).any()


RANDOM_WORDS = """
import random, sys
from megatron_spice.corpus import fast_encoder
from megatron_spice.corpus.tokenizer import TextTokenizer

fast_encoder._MOST_GROWTH = int(sys.argv[2])
tokenizer = TextTokenizer.from_dir(sys.argv[1])
encoder, rng = fast_encoder.GigatokenEncoder(tokenizer), random.Random(0)
begin = fast_encoder._resident()
for _ in range(20):
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=900_000))
    words = [letters[place : place + 9] for place in range(0, len(letters), 9)]
    texts = [" ".join(words[place : place + 500]) for place in range(0, len(words), 500)]
    encoded = encoder.encode(texts)
    assert encoded.ids[: encoded.lengths[0]].tolist() == tokenizer.encode(texts[0])
print(fast_encoder._resident() - begin)
"""


def test_the_cache_of_words_is_bounded(tokenizer_dir: Path) -> None:
    def growth(most: int) -> int:
        command = [sys.executable, "-c", RANDOM_WORDS, str(tokenizer_dir), str(most)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 1.6 * growth(16 << 20) < growth(1 << 40)


def test_gigatoken_is_chosen_where_it_agrees(holed: TextTokenizer) -> None:
    encoder, why = choose_encoder(holed, "auto", ["A document.", "\x04"])
    assert (encoder.name, why) == ("gigatoken", None)
    encoder, why = choose_encoder(holed, "huggingface")
    assert (encoder.name, why) == ("huggingface", None)


def test_where_it_differs_the_library_is_taken(
    tokenizer: TextTokenizer, other_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = fast_encoder._load
    monkeypatch.setattr(fast_encoder, "_load", lambda description: load(other_tokenizer.plain.to_str()))
    encoder, why = choose_encoder(tokenizer, "auto", ["padding " * 50 + "The river rises" + " padding" * 50])
    assert encoder.name == "huggingface"
    assert "other ids for" in why and len(why) < 300
    with pytest.raises(ValueError, match="--tokenizer-backend gigatoken cannot be used: it gives other ids"):
        choose_encoder(tokenizer, "gigatoken", ["The river rises"])


def test_a_tokenizer_that_it_refuses_is_left_to_the_library(spec: dict) -> None:
    spec = copy.deepcopy(spec)
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[aeiou]+|[^aeiou]+"}, "behavior": "Isolated", "invert": False},
            {**spec["pre_tokenizer"], "use_regex": False},
        ],
    }
    encoder, why = choose_encoder(TextTokenizer(spec), "auto")
    assert encoder.name == "huggingface" and "refuses this tokenizer" in why and "\n" not in why


def test_without_gigatoken_the_library_is_taken(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    encoder, why = choose_encoder(tokenizer, "auto")
    assert encoder.name == "huggingface" and "not installed" in why
    assert rows(encoder.encode(["The sea"])) == [tokenizer.encode("The sea")]


@settings(max_examples=10)
@given(text=nasty)
def test_a_fork_of_the_process_encodes_the_same(tokenizer: TextTokenizer, text: str) -> None:
    import multiprocessing

    encoder = GigatokenEncoder(tokenizer)
    encoder.encode(["warm up"])
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=lambda: there.send(rows(encoder.encode([text]))))
    process.start()
    assert here.recv() == [tokenizer.encode(text)]
    process.join()

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.corpus.segment import cut
from megatron_spice.corpus.tokenizer import TextTokenizer

words = st.sampled_from(["river", "in 1957", "e.g.", "3.5", "Ghana!", "\u6771\u4eac\u3002", "\U0001f600", "(so).", "a"])
gaps = st.sampled_from([" ", " ", "\n", "\n\n", "\r\n\r\n", "", "   \n \n  "])
texts = st.lists(st.tuples(words, gaps), min_size=1, max_size=60).map(lambda pairs: "".join(map("".join, pairs)))


def pieces(tokenizer: TextTokenizer, text: str, max_tokens: int, min_tokens: int = 1) -> list[str]:
    ids = tokenizer.encode(text)
    encoded, starts = tokenizer.to_bytes(ids)
    return [tokenizer.decode(ids[a : a + n]) for a, n in cut(encoded, starts, max_tokens, min_tokens)]


@given(text=texts, max_tokens=st.integers(4, 60))
def test_pieces_are_short_enough_and_make_up_the_text(tokenizer: TextTokenizer, text: str, max_tokens: int) -> None:
    ids = tokenizer.encode(text)
    encoded, starts = tokenizer.to_bytes(ids)
    places = cut(encoded, starts, max_tokens)
    assert [offset for offset, _ in places] == [0, *np.cumsum([length for _, length in places])[:-1]]
    assert sum(length for _, length in places) == len(ids)
    assert all(1 <= length <= max_tokens for _, length in places)
    # Decoded one by one: no character is cut in two.
    assert "".join(tokenizer.decode(ids[a : a + n]) for a, n in places) == text


@given(text=texts, max_tokens=st.integers(8, 60), data=st.data())
def test_no_piece_is_under_the_minimum(
    tokenizer: TextTokenizer, text: str, max_tokens: int, data: st.DataObject
) -> None:
    min_tokens = data.draw(st.integers(1, max_tokens // 2))
    ids = tokenizer.encode(text)
    encoded, starts = tokenizer.to_bytes(ids)
    places = cut(encoded, starts, max_tokens, min_tokens)
    assert all(min_tokens <= length <= max_tokens for _, length in places)
    if len(ids) < min_tokens:
        assert places == []
    elif max_tokens >= 2 * min_tokens + 8:
        assert sum(length for _, length in places) == len(ids)


def plain(text: str) -> tuple[bytes, np.ndarray]:
    """A text whose tokens are its single bytes."""
    return text.encode(), np.arange(len(text.encode()))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaa aaa. Aaa\n\nbbb bbb. B bbb", "aaa aaa. Aaa\n\n"),  # a paragraph before the later sentence
        ("aaa\n\naaa aa aaa aaaa. Bbb bbb", "aaa\n\naaa aa aaa aaaa. "),  # but not one in the first half
        ("aaaa aaa aa?\" Bb bbb bbb bbb b", 'aaaa aaa aa?" '),  # a sentence before the later word
        ("aaaa aaaa aa 3.5 bbb bbbbbbbbbb", "aaaa aaaa aa 3.5 bbb "),  # a decimal point ends nothing
        ("aaaaaaaa aaaaaaaa\nbbb bbb bbbbb", "aaaaaaaa aaaaaaaa\n"),  # the end of a line counts as a sentence
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaaaa"),
        ("\u00e9" * 16, "\u00e9" * 11),
        ("a" + "\u00e9" * 16, "a" + "\u00e9" * 10),  # 22 bytes would halve a character
    ],
)
def test_the_best_place_in_the_second_half_wins(text: str, first: str) -> None:
    encoded, starts = plain(text)
    offset, length = cut(encoded, starts, max_tokens=22)[0]
    assert encoded[offset : offset + length].decode() == first


def test_a_good_place_at_the_very_limit_is_seen(tokenizer: TextTokenizer) -> None:
    text = "a" * 9 + ". " + "b" * 20  # the gap after the full stop is at the limit itself
    encoded, starts = plain(text)
    assert cut(encoded, starts, max_tokens=10)[0] == (0, 10)
    assert cut(encoded, starts, max_tokens=11)[0] == (0, 11)


def test_the_end_is_not_left_too_short() -> None:
    encoded, starts = plain("a" * 24)
    assert cut(encoded, starts, max_tokens=20, min_tokens=8) == [(0, 16), (16, 8)]
    assert cut(encoded, starts, max_tokens=20, min_tokens=20) == [(0, 20)]


def test_sentences_of_a_real_tokenization(tokenizer: TextTokenizer) -> None:
    text = "The river rises in the hills. It runs to the sea; boats use it. In 1957 the country became independent."
    size = len(tokenizer.encode(text))
    first, *rest = pieces(tokenizer, text, max_tokens=int(size * 0.8))
    assert first == "The river rises in the hills. It runs to the sea; boats use it."
    assert "".join(rest).startswith(" In 1957")


@given(text=st.text("\u6771\u4eac\u3092\u30ab\u00e9\U0001f600", max_size=300), max_tokens=st.integers(8, 60))
def test_text_without_any_gap_is_cut_between_characters(tokenizer: TextTokenizer, text: str, max_tokens: int) -> None:
    found = pieces(tokenizer, text, max_tokens)
    assert "".join(found) == text
    assert "\ufffd" not in text and all("\ufffd" not in piece for piece in found)
    # Cut only where the next character would not fit, of at most four byte tokens.
    assert all(len(tokenizer.encode(piece)) > max_tokens - 4 for piece in found[:-1])


@given(ends=st.lists(st.integers(3, 30), min_size=4, max_size=40), max_tokens=st.integers(95, 200))
def test_ideographic_sentences_are_kept_whole(ends: list[int], max_tokens: int) -> None:
    sentences = ["\u6771" * length + "\u3002" for length in ends]  # of at most 93 bytes each: the tokens
    encoded, starts = plain("".join(sentences))
    places = cut(encoded, starts, 2 * max_tokens)
    borders = set(np.cumsum([len(sentence.encode()) for sentence in sentences]).tolist())
    assert {offset + length for offset, length in places} <= borders


@pytest.mark.parametrize("character", ["a", "\u6771", "\n", " ", ".", "\"", "\n ", ".)"])
def test_two_megabytes_of_one_character_are_cut_in_no_time(character: str) -> None:
    encoded, starts = plain(character * (2_000_000 // len(character.encode())))
    began = time.perf_counter()
    places = cut(encoded, starts, max_tokens=5992, min_tokens=32)
    assert time.perf_counter() - began < 10
    assert sum(length for _, length in places) == len(starts)

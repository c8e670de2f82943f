"""How much of a question or answer is copied from the passage: the longest run of words that both have.

A question that repeats a sentence of its passage tests memory of a string, not reasoning, and one that names its own answer
tests nothing. Words, not characters: names and numbers that both must share are short runs and do not count as copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from megatron_spice.game.audit.words import words

COPIED_WORDS = 8
"""A run of so many words that question and passage share is a copy."""


def longest_span(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest run of words that stands in both."""
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size


def copied_words(text: str, passage: str) -> int:
    """Words of the longest run of `text` that stands in the passage as well."""
    return longest_span(words(text), words(passage))

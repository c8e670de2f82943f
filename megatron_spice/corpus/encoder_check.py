"""Which encoder a corpus is made with: gigatoken, once it has shown that it gives the Hugging Face tokenizer's ids.

It is shown on documents of the corpus itself and on strings that are hard for any tokenizer. What this cannot show, because
only a rare text would, is why `auto` prefers the slow encoder as soon as anything differs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from megatron_spice.corpus.fast_encoder import Encoder, GigatokenEncoder, HuggingFaceEncoder
from megatron_spice.corpus.tokenizer import TextTokenizer

BACKENDS = ("auto", "gigatoken", "huggingface")
_A_CATEGORY = 12  # characters of each Unicode category among the hard strings
_SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u3000\u200b\ufeff"
_HARD = (
    "",
    "\0",
    "nul\0in\0the midst",
    "".join(map(chr, range(128))),
    "don't DON'T we'll WE'LL it's IT'S I'd i'm you've they're 'sx 'S' ' s",
    "1 12 123 1234 12345 1,234.5 3.14e-10 0x1F 2026-11-26 \u0661\u0662\u0663 \u00bd \u2167 x2 y\u00b2",
    "def f(x):\n\treturn x**2  # comment\n\n\n    if a==b and c!=d: pass\r\n\r\n",
    "\u6771\u4eac\u3002\u4e2d\u6587\u6587\u672c\u3001\u304b\u306a\u30ab\u30ca\ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "e\u0301 \u00e9 a\u0308\u0323 \u1e69 \u0073\u0323\u0307 \ufb01 \u2460 \u1100\u1161\u11a8 \uac01",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt ... --- === ####",
    "A" * 300 + " " * 300 + "\n" * 30 + "ab" * 150,
)


def choose_encoder(tokenizer: TextTokenizer, backend: str, texts: Sequence[str] = ()) -> tuple[Encoder, str | None]:
    """The encoder to use, and why it is not gigatoken when that was hoped for.

    Args:
        backend: one of `BACKENDS`.
        texts: of the corpus, to compare the encoders on, besides strings that are known to be hard.

    Raises:
        ValueError: `backend` is gigatoken and it cannot be used.
    """
    assert backend in BACKENDS
    slow = HuggingFaceEncoder(tokenizer)
    if backend == "huggingface":
        return slow, None
    try:
        fast = GigatokenEncoder(tokenizer)
        problem = difference(slow, fast, [*texts, *hard_strings(tokenizer)])
    except ImportError as error:
        problem = f"it is not installed ({error})"
    except Exception as error:  # noqa: BLE001 (whatever it raises means that it cannot be used)
        problem = "it refuses this tokenizer: " + (str(error).splitlines() or [repr(error)])[0]
    if problem is None:
        return fast, None
    if backend == "gigatoken":
        raise ValueError(f"--tokenizer-backend gigatoken cannot be used: {problem}; leave the option out, or set huggingface")
    return slow, f"encoding with the Hugging Face tokenizer, which is many times slower than gigatoken: {problem}"


def difference(slow: Encoder, fast: Encoder, texts: Sequence[str]) -> str | None:
    """Where the second encoder differs from the first, in words; None when it does not."""
    right, other = slow.encode(texts), fast.encode(texts)
    if np.array_equal(right.lengths, other.lengths) and np.array_equal(right.ids, other.ids):
        return None
    for text in texts:
        if not np.array_equal(slow.encode([text]).ids, fast.encode([text]).ids):
            return f"it gives other ids for {_shortest(slow, fast, text)!r}"
    return "it gives other ids for texts together than for each alone"


def hard_strings(tokenizer: TextTokenizer) -> Iterator[str]:
    """Texts in which tokenizers have been seen to differ, some of them made from this tokenizer's own vocabulary."""
    yield from _HARD
    for space in {*_SPACES, *(text for text in tokenizer.added_texts if text.isspace())}:
        yield f"a{space}b {space}c{space}{space}d {space} {space}\n{space}e{space * 7}1{space}"
    for text in tokenizer.added_texts:
        yield f"{text} a{text}b {text[:-1]} {text}{text}"
    for characters in _by_category():
        for character in characters:
            yield f"a{character}b {character}c{character} 1{character}2 !{character}?{character}\n{character}'s"
        yield "".join(characters)


def _by_category() -> Iterator[list[str]]:
    """Some characters of each Unicode category, spread over those that there are below U+30000."""
    found: dict[str, list[str]] = {}
    for point in range(0, 0x30000, 7):  # a step that meets every category
        character = chr(point)
        found.setdefault(unicodedata.category(character), []).append(character)
    found.pop("Cs")  # half of a pair: not a text
    for characters in found.values():
        yield list(islice(characters, 0, None, max(len(characters) // _A_CATEGORY, 1)))[:_A_CATEGORY]


def _shortest(slow: Encoder, fast: Encoder, text: str) -> str:
    """A part of the text that still shows the difference, by halving it as long as that works."""
    while len(text) > 8:
        half = len(text) // 2
        for part in (text[:half], text[half:], text[half // 2 : half + half // 2]):
            if not np.array_equal(slow.encode([part]).ids, fast.encode([part]).ids):
                text = part
                break
        else:
            break
    return text[:80]

"""Many texts to ids at once, as numpy arrays: by gigatoken where it agrees with the Hugging Face tokenizer, else by that.

gigatoken is some thirty times faster on a core. It gets the same *plain* description of the tokenizer (plain_text.py), so
control tokens spelled in a text stay text. It differs from the Hugging Face tokenizer, which defines the ids, in three ways:

- It refuses a vocabulary that lacks single bytes (SmolLM2 lacks 21), which Hugging Face drops silently. Such bytes get ids past
  the vocabulary, and a text in whose ids one occurs is encoded again by Hugging Face: without the byte, what stood before and
  after it may merge, so leaving the id out would not do.
- Its Unicode tables are newer: so are texts with a character that one of the two may not know (disputed.py).
- Its cache of words grows without bound (3 GB after 150 MB of random letters). When the process has grown by `_MOST_GROWTH` it is
  loaded anew, which takes a tenth of a second.

Anything else would be a fault of gigatoken, and is looked for on texts of the corpus before it is used (encoder_check.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_spice.corpus.disputed import doubtful_tokens, has_disputed
from megatron_spice.corpus.plain_text import byte_level_alphabet
from megatron_spice.corpus.tokenizer import TextTokenizer

_MOST_GROWTH = 160 << 20
_AT_ONCE = 1 << 18  # ids looked up at once: numpy makes eight bytes of each for that
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Encoded(NamedTuple):
    """Ids of several texts: `ids` (uint32) of all, one text after the other, and each text's `lengths` (int64 [texts])."""

    ids: np.ndarray
    lengths: np.ndarray


class Encoder(Protocol):
    """Encodes texts as `TextTokenizer.encode` does, in this thread."""

    name: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts, in their order."""


class HuggingFaceEncoder:
    """The tokenizer that defines the ids."""

    name = "huggingface"

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts, in their order."""
        rows = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return Encoded(np.fromiter(chain.from_iterable(rows), dtype=np.uint32, count=int(lengths.sum())), lengths)


class GigatokenEncoder:
    """gigatoken, with what it does otherwise than Hugging Face mended.

    Raises:
        ImportError: it is not installed.
        RuntimeError: it refuses the tokenizer.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._description, missing = _description(tokenizer)
        self._backend = _load(self._description)
        self._doubtful = np.concatenate([doubtful_tokens(tokenizer.token_bytes), np.ones(missing, dtype=bool)])
        self._first_missing = tokenizer.vocab_size
        self._resident_at_load: dict[int, int] = {}  # by process: workers are forked with the backend in them

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts, in their order."""
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        bounds, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        ids = ids[bounds[0] : bounds[-1]]
        encoded = self._mended(texts, ids, bounds - bounds[0])
        self._bound_memory()
        return encoded

    def _mended(self, texts: Sequence[str], ids: np.ndarray, bounds: np.ndarray) -> Encoded:
        """The ids, with texts that gigatoken may have got wrong encoded again."""
        lengths = np.diff(bounds)
        blocks = range(0, len(ids), _AT_ONCE)
        places = np.concatenate([np.flatnonzero(self._doubtful[ids[at : at + _AT_ONCE]]) + at for at in blocks] or [[]])
        pieces, done = [], 0
        for row in np.unique(np.searchsorted(bounds, places, side="right") - 1).tolist():
            begin, end = int(bounds[row]), int(bounds[row + 1])
            if (ids[begin:end] >= self._first_missing).any() or has_disputed(texts[row]):
                right = np.array(self._tokenizer.encode(texts[row]), dtype=np.uint32)
                pieces += [ids[done:begin], right]
                lengths[row], done = len(right), end
        return Encoded(np.concatenate([*pieces, ids[done:]]) if pieces else ids, lengths)

    def _bound_memory(self) -> None:
        process, resident = os.getpid(), _resident()
        if resident - self._resident_at_load.setdefault(process, resident) > _MOST_GROWTH:
            del self._backend
            self._backend = _load(self._description)
            self._resident_at_load[process] = _resident()


def _description(tokenizer: TextTokenizer) -> tuple[str, int]:
    """tokenizer.json of the plain tokenizer as gigatoken takes it, and how many missing bytes were added to it."""
    text, plain = tokenizer.plain.to_str(), tokenizer.plain
    if not tokenizer.is_byte_level:
        return text, 0
    missing = [character for character in byte_level_alphabet() if plain.token_to_id(character) is None]
    if not missing and '"byte_fallback":true' not in text:
        return text, 0
    spec: dict[str, Any] = json.loads(text)
    spec["model"]["vocab"].update({character: tokenizer.vocab_size + place for place, character in enumerate(missing)})
    spec["model"]["byte_fallback"] = False  # has no meaning without tokens for it, and gigatoken refuses it then
    return json.dumps(spec), len(missing)


def _load(description: str) -> Any:
    import awkward  # noqa: F401 (takes a third of a second: before workers are forked, not in each)
    from gigatoken.gigatoken_rs import load_hf_json

    return load_hf_json(description)


def _resident() -> int:
    """Bytes of memory that this process has in use."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE

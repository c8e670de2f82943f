"""A tokenizer that has no control tokens, made from one that has.

Every tokenizer turns a control token *spelled* in a text (`<|im_end|>` in a web page about chat formats) into the
control id, and a passage could so end the user's turn and speak as the assistant. The library's switch for this covers
only tokens flagged special, not the likes of `<think>` or `<tool_call>`. So the control tokens are taken out of the
tokenizer's description before it is built: what is not there cannot be matched. What is kept among the added tokens is
whitespace, which some vocabularies hold there and which is ordinary text.

The unknown token goes too: a vocabulary with holes (SmolLM2 lacks 21 byte values) would otherwise write it, and it
usually is the end-of-text control token. Such bytes are dropped instead.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cache

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


def is_control(added_token: dict) -> bool:
    """Whether an entry of tokenizer.json's `added_tokens` is more than ordinary text."""
    return bool(added_token["special"]) or bool(added_token["content"].strip())


def without_control_tokens(spec: dict) -> dict:
    """The parsed tokenizer.json `spec` without control tokens, unknown token, truncation and padding."""
    plain = copy.copy(spec)
    plain["added_tokens"] = [token for token in spec.get("added_tokens") or [] if not is_control(token)]
    plain["model"] = {**spec["model"], "unk_token": None}
    plain["post_processor"] = plain["truncation"] = plain["padding"] = None
    return plain


def build(spec: dict) -> Tokenizer:
    """The tokenizer of ordinary text described by `spec`.

    Raises:
        ValueError: the model can produce a control token from its spelling (Unigram and word-level vocabularies can).
    """
    kind = spec["model"].get("type")
    if kind != "BPE":
        raise ValueError(
            f"tokenizer.json describes a {kind} model; only BPE is supported, because the others can turn spelled "
            "control tokens into control ids"
        )
    tokenizer = Tokenizer.from_str(json.dumps(without_control_tokens(spec)))
    for token in spec.get("added_tokens") or []:
        if is_control(token) and token["id"] in tokenizer.encode(token["content"], add_special_tokens=False).ids:
            raise ValueError(
                f"this tokenizer's merges turn the text {token['content']!r} into control id {token['id']}; "
                "texts cannot be encoded safely with it"
            )
    return tokenizer


def plain_hash(spec: dict) -> str:
    """SHA-256 of what decides how ordinary text becomes ids: normaliser, splitting, vocabulary, merges.

    Control tokens outside the vocabulary do not count: a corpus stays valid when a chat token is added to a model.
    Neither does the file's layout: merges are written as pairs or as strings by different versions of the library.
    """
    model = spec["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    settings = {key: model.get(key) or None for key in ("type", "continuing_subword_prefix", "end_of_word_suffix")}
    settings.update({key: bool(model.get(key)) for key in ("byte_fallback", "ignore_merges")})
    spaces = sorted((t["id"], t["content"]) for t in spec.get("added_tokens") or [] if not is_control(t))
    identity = {
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": spec.get("pre_tokenizer"),
        "settings": settings,
        "vocab": sorted(model["vocab"].items()),
        "merges": merges,
        "spaces": spaces,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def byte_table(spec: dict) -> list[bytes]:
    """What each id of the vocabulary stands for in UTF-8 text: entry i holds the bytes of id i (b"" if there is none).

    Byte-level vocabularies spell a byte as one printable character; the SentencePiece kind writes a space as U+2581 and
    bytes it has no token for as `<0x0A>`. A token may hold part of a character, so entries need not be valid UTF-8.
    """
    added = spec.get("added_tokens") or []
    size = 1 + max([*spec["model"]["vocab"].values(), *(token["id"] for token in added)])
    table = [b""] * size
    to_bytes = _from_byte_level if "ByteLevel" in json.dumps(spec.get("decoder")) else _from_sentencepiece
    for token, index in spec["model"]["vocab"].items():
        table[index] = to_bytes(token)
    for token in added:
        table[token["id"]] = token["content"].encode()
    return table


def is_byte_level(spec: dict) -> bool:
    """Whether the vocabulary spells bytes as characters (`byte_level_alphabet`)."""
    return '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("normalizer")])


def spells_text(spec: dict) -> tuple[bool, bool]:
    """Whether the ids of any text, and of any ASCII text, stand for just its bytes, if none of them is dropped."""
    normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    as_it_is = is_byte_level(spec) and '"add_prefix_space": true' not in json.dumps(spec.get("pre_tokenizer"))
    return as_it_is and not steps, as_it_is and all(step["type"] in ("NFC", "NFKC", "NFD", "NFKD") for step in steps)


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    assert set(alphabet) == set(ByteLevel.alphabet())
    return alphabet


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(map(byte_level_alphabet().__getitem__, token))
    except KeyError:  # a control token that sits in the vocabulary under its own spelling
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()

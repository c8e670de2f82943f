"""Text to ids and back, with one wall: only the prompts we wrote ourselves may contain control tokens.

Two tokenizers from one tokenizer.json. The plain one (see `plain_text.py`) encodes everything; control tokens are
looked up only in trusted segments of a prompt, and what lies between them is joined before it is encoded, so a prompt
gets the ids that the model's own tokenizer would give it, unless an untrusted segment spells a control token. The full
one only decodes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_spice.corpus import plain_text
from megatron_spice.corpus.chat_template import ChatTemplate, token_text
from megatron_spice.game.records import Prompt, Segment

_TO_BYTES_AT_ONCE = 1 << 16  # ids; bounds the memory for it
_LARGEST_INT32 = 2**31 - 1


class TextTokenizer:
    """A model's tokenizer.

    Attributes:
        vocab_hash: hexadecimal SHA-256 that is equal for tokenizers giving ordinary texts the same ids.
        vocab_size: largest id + 1, control tokens included.
        control_ids: ids that plain text never gets.
        stop_ids: ids that end the model's generation, ascending.
        added_texts: spellings of the tokens that were added to the vocabulary, control tokens and others.
        token_bytes: what each id stands for in UTF-8, see `plain_text.byte_table`.
        plain: the tokenizer that `encode` uses.
        is_byte_level: whether its vocabulary spells bytes as characters.
    """

    def __init__(
        self,
        spec: dict,
        *,
        chat_template: ChatTemplate | None = None,
        stop_ids: Iterable[int] = (),
        load: Callable[[], Tokenizer] | None = None,
    ):
        """From a parsed tokenizer.json `spec`; `from_dir` is the usual way in. `load` makes the library's tokenizer of it."""
        self._load = load or partial(Tokenizer.from_str, json.dumps(spec))
        self.plain = plain_text.build(spec)
        controls = [token for token in spec.get("added_tokens") or [] if plain_text.is_control(token)]
        self.added_texts = [token["content"] for token in spec.get("added_tokens") or []]
        self._control_by_text = {token["content"]: token["id"] for token in controls}
        self._control_pattern = _control_pattern(controls)
        self.token_bytes = plain_text.byte_table(spec)
        self._bytes = np.frombuffer(b"".join(self.token_bytes), dtype=np.uint8)
        self._byte_lengths = np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)
        self._byte_starts = np.cumsum(self._byte_lengths) - self._byte_lengths
        self.is_byte_level = plain_text.is_byte_level(spec)
        self._spells_all, self._spells_ascii = plain_text.spells_text(spec)
        self._chat_template = chat_template
        self.vocab_hash = plain_text.plain_hash(spec)
        self.vocab_size = len(self.token_bytes)
        self.control_ids = frozenset(self._control_by_text.values())
        self.stop_ids = tuple(sorted(set(stop_ids)))

    @classmethod
    def from_dir(cls, folder: str | os.PathLike[str]) -> TextTokenizer:
        """The tokenizer of a Hugging Face model folder.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: it cannot be used for texts safely (see `plain_text.build`), or a file is broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json in {folder}; write one with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
            )
        spec, config = _read_json(path), _read_json(folder / "tokenizer_config.json")
        template = ChatTemplate.from_dir(folder, config)
        load = partial(Tokenizer.from_file, str(path))
        return cls(spec, chat_template=template, stop_ids=_stop_ids(folder, spec, config), load=load)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: control tokens spelled in it stay text. No id is added at either end."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [row.ids for row in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt; control tokens count as such in its trusted segments only.

        A prompt without chat template gets the ids that the model expects at the start of a text (Llama's
        begin-of-text), unless it has them already.
        """
        ids: list[int] = []
        text = ""
        for segment in prompt:
            for piece, control in self._pieces(segment):
                if control is None:
                    text += piece
                    continue
                ids += self.encode(text) + [control]
                text = ""
        ids += self.encode(text)
        if ids[: len(self._leading_ids)] != self._leading_ids:
            ids = self._leading_ids + ids
        return ids

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Text of ids, without special control tokens unless `keep_control`. Broken UTF-8 becomes U+FFFD."""
        return self._full.decode(list(ids), skip_special_tokens=not keep_control)

    def to_bytes(self, ids: Sequence[int] | np.ndarray, text: str | None = None) -> tuple[bytes, np.ndarray]:
        """UTF-8 bytes of ids, and where each id's bytes start in them (integers [len(ids)]).

        Args:
            text: what was encoded, if that is known: mostly its own bytes are the result, which is much faster.
        """
        ids = np.asarray(ids)
        lengths = np.empty(len(ids), dtype=np.int32)
        blocks = [slice(begin, begin + _TO_BYTES_AT_ONCE) for begin in range(0, len(ids), _TO_BYTES_AT_ONCE)]
        for some in blocks:  # one after the other, since numpy makes eight bytes of each index for as long as it looks up
            lengths[some] = self._byte_lengths[ids[some]]
        starts = np.cumsum(lengths, dtype=np.int64 if lengths.sum() > _LARGEST_INT32 else np.int32)
        total = int(starts[-1]) if len(ids) else 0
        starts -= lengths
        if text is not None and (self._spells_all or (self._spells_ascii and text.isascii())):
            data = text.encode()
            if len(data) == total:  # no byte was dropped
                return data, starts
        pieces = []
        for some in blocks:
            first = starts[some.start].astype(np.int64)
            places = np.repeat(self._byte_starts[ids[some]] - (starts[some] - first), lengths[some])
            pieces.append(self._bytes[places + np.arange(len(places))].tobytes())
        return b"".join(pieces), starts

    def chat_wrapper(self, system: str | None) -> tuple[str, str]:
        """Text before and after a single user message in the model's own chat format, ready for the assistant's turn.

        Raises:
            ValueError: the model has no chat template, or it does not take such messages.
        """
        if self._chat_template is None:
            raise ValueError(
                "this model has no chat template (chat_template.jinja or tokenizer_config.json); "
                "set game.prompt_style=few_shot or add a template to the model folder"
            )
        return self._chat_template.wrapper(system)

    def _pieces(self, segment: Segment) -> Iterable[tuple[str, int | None]]:
        """Runs of text, and control tokens with their id, in the order of the segment."""
        if not segment.trusted or self._control_pattern is None:
            yield segment.text, None
            return
        for place, piece in enumerate(self._control_pattern.split(segment.text)):
            if place % 2 == 0:
                yield piece, None
            else:  # some control tokens swallow the space around them, so look up the token alone
                yield piece, self._control_by_text.get(piece, self._control_by_text.get(piece.strip()))

    @cached_property
    def _full(self) -> Tokenizer:
        """The tokenizer with its control tokens. Made when first needed: making a corpus does without it."""
        full = self._load()
        full.no_truncation()
        full.no_padding()
        return full

    @cached_property
    def _leading_ids(self) -> list[int]:
        """What the model expects at the start of a text."""
        bare = self._full.encode("a", add_special_tokens=False).ids
        framed = self._full.encode("a", add_special_tokens=True).ids
        return framed[: framed.index(bare[0])]


def _control_pattern(controls: list[dict]) -> re.Pattern[str] | None:
    if not controls:
        return None
    ordered = sorted(controls, key=lambda token: len(token["content"]), reverse=True)
    spellings = [
        (r"\s*" if token.get("lstrip") else "") + re.escape(token["content"]) + (r"\s*" if token.get("rstrip") else "")
        for token in ordered
    ]
    return re.compile("(" + "|".join(spellings) + ")")


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} when there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _stop_ids(folder: Path, spec: dict, tokenizer_config: dict) -> list[int]:
    """The model's end-of-text ids, by the file that knows best.

    generation_config.json lists what ends a generation; config.json and the tokenizer name one id. The tokenizer's file
    comes last: folders converted from other formats are seen with a wrong id there.
    """
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    text = token_text(tokenizer_config.get("eos_token"))
    by_text = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    return [by_text[text]] if text in by_text else []

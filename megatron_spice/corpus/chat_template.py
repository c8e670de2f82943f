"""A model's chat format, from its own template, as the text before and after a user's message.

The template is a small program out of a model folder, so it runs in Jinja's sandbox. Rendering it here rather than
through transformers spares every rank that library's import; the few helpers that templates expect are below.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_spice.config.chat_templates import template_source

_PLACEHOLDER = "\N{WHITE SMILING FACE}user-message-goes-here\N{WHITE SMILING FACE}"


class ChatTemplate:
    """The Jinja `source` with the `variables` (bos_token, eos_token, ...) it may use."""

    def __init__(self, source: str, variables: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the model's chat template cannot be read: {error}") from error
        self._variables = variables

    @classmethod
    def from_dir(cls, folder: Path, tokenizer_config: dict) -> ChatTemplate | None:
        """The template of a Hugging Face folder (chat_template.jinja, else tokenizer_config.json), None without one."""
        source = template_source(folder, tokenizer_config)
        if source is None:
            return None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        values = {name: token_text(tokenizer_config.get(name)) for name in names}
        return cls(source, {name: value for name, value in values.items() if value is not None})

    def wrapper(self, system: str | None) -> tuple[str, str]:
        """Text before and after one user message, ready for the assistant's turn.

        `system` None leaves the system message to the template: some (SmolLM2's) then insert a default of their own.

        Raises:
            ValueError: the template refuses these messages, or does not show the user's message exactly once.
        """
        messages = [{"role": "user", "content": _PLACEHOLDER}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._variables
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses a system and a user message: {error}") from error
        before, *after = text.split(_PLACEHOLDER)
        if len(after) != 1:
            raise ValueError(f"the model's chat template shows the user's message {len(after)} times, expected once")
        return before, after[0]


def token_text(token: str | dict | None) -> str | None:
    """A special token of tokenizer_config.json as text: it is a string there, or a dict with `content`."""
    return token["content"] if isinstance(token, dict) else token


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training masks; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):  # noqa: ANN001, ANN201 (Jinja's own types)
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, indent: int | None = None, **options: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)

"""The settings for people: a reference of all keys, and a recipe with every default filled in."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import yaml

from megatron_spice.config.keys import Key, all_keys, sections
from megatron_spice.config.schema import Config


def reference(width: int = 110) -> str:
    """All keys by section, each with what it may be, its default and its meaning."""
    lines = ["Settings of a recipe. Write them as YAML, or after the recipe as key.sub=value.", ""]
    for section in sections():
        lines.append(f"{section}:")
        for key in all_keys().values():
            if key.name.rsplit(".", 1)[0] == section:
                lines += _entry(key, width)
        lines.append("")
    return "\n".join(lines)


def _entry(key: Key, width: int) -> list[str]:
    default = "required" if key.required else f"default {_plain(key.default)}"
    text = f"{key.allowed}; {default}." + (f" {key.description}" if key.description else "")
    return [f"  {key.name}", *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def resolved(config: Config) -> str:
    """The recipe as YAML with every key, readable again by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=False, width=110)

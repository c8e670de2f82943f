"""The settings as a flat list of keys, drawn from the schema's own fields: `policy.precision`, its type, default and meaning.

Errors that propose the nearest key and `python -m megatron_spice config` read this list, so neither can say something that
the schema does not.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_spice.config.schema import Config

REFERENCE = "`python -m megatron_spice config` lists all keys"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `allowed` says in words what a value may be; `default` is None for required keys too (`required`)."""

    name: str
    allowed: str
    default: Any
    required: bool
    description: str


def all_keys() -> dict[str, Key]:
    """Every setting of a recipe by its dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


def sections() -> list[str]:
    """Dotted names of the groups (`policy`, `game.verifier`, ...)."""
    return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in all_keys()))


def nearest(name: str) -> str | None:
    """The key or section that a mistyped `name` most probably means, None when nothing is near.

    A key put into the wrong section counts as near: people remember `temperature` better than where it belongs.
    """
    names = [*all_keys(), *sections()]
    last = name.rsplit(".", 1)[-1]
    same_last = [key for key in names if key.rsplit(".", 1)[-1] == last]
    close = difflib.get_close_matches(name, same_last or names, n=1, cutoff=0.0 if same_last else 0.6)
    if not close:
        ends = {key.rsplit(".", 1)[-1]: key for key in names}
        close = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.7)]
    return close[0] if close else None


def _walk(model: type[BaseModel], prefix: str) -> list[Key]:
    keys = []
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _walk(field.annotation, f"{dotted}.")
        else:
            default = None if field.is_required() else field.get_default()
            keys.append(Key(dotted, _allowed(field), default, field.is_required(), field.description or ""))
    return keys


def _allowed(field: FieldInfo) -> str:
    return _type_in_words(field.annotation, list(field.metadata))


def _type_in_words(annotation: Any, limits: list[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _type_in_words(arguments[0], _flatten(arguments[1:]) + limits)
    if origin in (typing.Union, types.UnionType):
        inner = [part for part in arguments if part is not type(None)]
        nothing = ["null"] if len(inner) < len(arguments) else []
        return " or ".join([*(_type_in_words(part, limits) for part in inner), *nothing])
    if origin is list:
        least = "a non-empty list" if any(isinstance(limit, MinLen) for limit in limits) else "a list"
        return f"{least} of: " + _type_in_words(arguments[0], []).removeprefix("one of ")
    if origin is dict:
        return f"{_type_in_words(arguments[1], [])} for each label (NAME: VALUE)"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return " ".join([words.get(annotation, str(annotation)), *_limits(limits)])


def _flatten(metadata: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for item in metadata:
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _limits(limits: list[Any]) -> list[str]:
    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    words = [f"{signs[type(limit)][0]} {getattr(limit, signs[type(limit)][1]):g}" for limit in limits if type(limit) in signs]
    return [" and ".join(words)] if words else []

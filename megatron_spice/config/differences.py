"""Where two recipes differ, key by key: what a resumed run does otherwise than the one that made its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from megatron_spice.config.keys import all_keys


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`policy.learning_rate: was 1e-06, is 2e-06` for each key whose value differs, in the order of the settings.

    Args:
        was, now: whole recipes as they are dumped to JSON. Those of another version may lack settings, or have others.
    """
    keys = frozenset(all_keys())
    before, after = _settings(was, keys), _settings(now, keys)
    names = dict.fromkeys([*after, *before])
    return [_words(name, before, after) for name in names if _value(name, before) != _value(name, after)]


def _words(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{name}: was {_value(name, before)}, is {_value(name, after)}"


def _value(name: str, settings: Mapping[str, Any]) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "no setting"


def _settings(recipe: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. A setting may itself be a mapping, of labels to numbers; a section never is a setting."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and dotted not in keys:
            found |= _settings(value, keys, f"{dotted}.")
        else:
            found[dotted] = value
    return found

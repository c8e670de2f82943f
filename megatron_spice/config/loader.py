"""From a YAML recipe and `key.sub=value` overrides to a frozen `Config`, or to one error that names all that is wrong.

    load_config("examples/quickstart.yaml", ["train.iterations=2", "game.answer_types=[String]"])

Overrides are YAML too, so `true`, `null`, `[a, b]` and `1e-6` mean what they mean in a recipe. Relative paths are taken
from the current directory. A recipe that differs from another in a few values names it, from its own folder, and says only
those: `base: ../quickstart.yaml`. There is no other substitution; `plan` prints the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.keys import REFERENCE, all_keys, nearest, sections
from megatron_spice.config.schema import Config


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The settings of the recipe at `path` with `overrides` (each `key.sub=value`) applied in order.

    Only single values are judged here; `checks.check` judges how they go together.

    Raises:
        ConfigError: the file cannot be read or parsed, or holds unknown keys, wrong or missing values. Its message
            names every such key, the value found and what to write instead.
    """
    tree = _read_with_base(Path(path), ())
    problems: list[str] = []
    for override in overrides or []:
        problems += _apply(tree, override)
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems += _explain(detail)
    problems += _booleans_as_numbers(tree)
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)), str(path))
    return config


def _read_with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe over what its `base` says; a value that is a map, such as `corpus.weights`, is replaced as a whole."""
    tree = _fill_empty_sections(_read(path))
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={_show(base)} is not a path; give one recipe's, from this one's folder")
    below, above = path.parent / base, (*above, path.resolve())
    if below.resolve() in above:
        raise ConfigError(f"{path}: base={base} leads back to a recipe that is being read; leave one of the bases out")
    if not below.is_file():
        raise ConfigError(f"{path}: base={base} is not there; it is taken from {path.parent}")
    return _over(_read_with_base(below, above), tree, "")


def _over(below: dict[str, Any], above: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged, known = dict(below), sections()
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _over(below[key], value, f"{prefix}{key}.") if both and f"{prefix}{key}" in known else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"recipe {path} is not a file; recipes to start from are in examples/")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `train:` and `policy:`, it holds {tree!r}")
    return tree


def _fill_empty_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """`game:` with all its keys commented out is null in YAML; it means an empty section."""
    for section in sections():
        *parents, last = section.split(".")
        here: Any = tree
        for parent in parents:
            here = here.get(parent) if isinstance(here, dict) else None
        if isinstance(here, dict) and last in here and here[last] is None:
            here[last] = {}
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: by the standard it is one, and the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    return f"{path}, {where}: not valid YAML: {getattr(error, 'problem', None) or error}"


def _apply(tree: dict[str, Any], override: str) -> list[str]:
    """Sets one override in `tree`; returns what is wrong with it."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        return [f"override {override!r} is not of the form key.sub=value, such as train.iterations=2"]
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        return [f"{name}={text}: the value is not valid YAML: {getattr(error, 'problem', None) or error}; quote it"]
    *parents, last = name.split(".")
    here = tree
    for depth, parent in enumerate(parents):
        below = here.get(parent)
        if below is None:
            below = here[parent] = {}
        if not isinstance(below, dict):
            return [f"{name}={text}: {'.'.join(parents[: depth + 1])} is a single value, not a section; {REFERENCE}"]
        here = below
    here[last] = value
    return []


def _explain(detail: Any) -> list[str]:
    """One pydantic error as key, value and remedy; an unknown section is one problem a key."""
    location, value = [str(part) for part in detail["loc"]], detail["input"]
    name, keys = ".".join(location), all_keys()
    if detail["type"] == "extra_forbidden":
        return [_unknown(leaf, leaf_value) for leaf, leaf_value in _leaves(name, value)]
    if detail["type"] == "missing":
        return [_missing(name)]
    while len(location) > 1 and ".".join(location) not in keys:
        location.pop()
    key = keys.get(".".join(location))
    if key is None:
        return [f"{name}={_show(value)}: this is a section, its keys go below it; {REFERENCE}"]
    if name != key.name:
        return [f"{key.name} holds {_show(value)}: not allowed; give {key.allowed}"]
    return [f"{name}={_show(value)}: not allowed; give {key.allowed}"]


def _unknown(name: str, value: Any) -> str:
    near = nearest(name)
    hint = f"did you mean {near}? " if near else ""
    return f"{name}={_show(value)}: unknown key; {hint}{REFERENCE}"


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]


def _missing(name: str) -> str:
    """A required key that is not there; a whole section that is missing is named by what it must hold."""
    required = [key for key in all_keys().values() if key.required and (key.name == name or key.name.startswith(f"{name}."))]
    words = ", ".join(f"{key.name} ({key.description.rstrip('.')})" for key in required)
    return f"{words or name}: missing; add it to the recipe or give {required[0].name if required else name}=... after it"


def _booleans_as_numbers(tree: dict[str, Any]) -> list[str]:
    """`train.iterations: true` would be taken for 1: a number is asked for, and `yes` is a boolean in YAML."""
    problems = []
    for key in all_keys().values():
        value: Any = tree
        for part in key.name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, bool) and "number" in key.allowed:
            problems.append(f"{key.name}={_show(value)}: not allowed; give {key.allowed}")
    return problems


def _show(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

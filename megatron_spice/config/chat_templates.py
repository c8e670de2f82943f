"""Where a model's chat template stands, and whether a recipe that asks by `chat` has one: base models are published without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import hugging_face_folder
from megatron_spice.config.schema import Config

FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The template of a Hugging Face folder as text: the file's, else what its parsed tokenizer_config.json holds; None without one."""
    file = folder / FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several named templates
        return next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def chat_problems(config: Config) -> list[str]:
    """What keeps models that are asked by `chat` from being asked; a folder that is not there is judged elsewhere."""
    told, style = config.rollout.challenger, config.game.prompt_style
    policy = f"policy.model={config.policy.model}"
    asked: dict[str, tuple[str, Path | None]] = {}  # by the setting that names the model: the one that asks by chat, the folder
    if style == "chat":
        asked[policy] = ("game.prompt_style", _policy_folder(config))
    if told.engines and (told.prompt_style or style) == "chat":
        key = "rollout.challenger.prompt_style" if told.prompt_style else "game.prompt_style"
        if told.tokenizer is not None:
            asked[f"rollout.challenger.tokenizer={told.tokenizer}"] = (key, told.tokenizer)
        else:
            asked.setdefault(policy, (key, _policy_folder(config)))
    problems = [_problem(named, key, folder) for named, (key, folder) in asked.items() if folder is not None and folder.is_dir()]
    return [problem for problem in problems if problem]


def _policy_folder(config: Config) -> Path | None:
    try:
        return hugging_face_folder(config.policy.model)
    except ConfigError:
        return None


def _problem(named: str, key: str, folder: Path) -> str:
    """What is wrong with the template in a folder, or ""."""
    path = folder / TOKENIZER_CONFIG
    try:
        tokenizer_config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        source = template_source(folder, tokenizer_config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{named}: the chat template of {folder} cannot be read ({type(error).__name__}: {error}); copy its files again"
    if source is not None:
        return ""
    return (
        f"{named} has no chat template ({FILE} or chat_template in {TOKENIZER_CONFIG}, looked for in {folder}), which {key}=chat needs; "
        f"give an instruction-tuned model, put a template there, or give {key}=few_shot"
    )

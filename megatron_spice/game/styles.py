"""From `game.prompt_style` to the style itself."""

from __future__ import annotations

from megatron_spice.game.prompts import PromptStyle
from megatron_spice.game.prompts_chat import ChatStyle
from megatron_spice.game.prompts_few_shot import FewShotStyle
from megatron_spice.game.records import Tokenizer


def style_for(name: str, tokenizer: Tokenizer) -> PromptStyle:
    """The prompt style that `game.prompt_style` names; `chat` takes its wrapper from the tokenizer.

    Raises:
        ValueError: no such style.
    """
    if name == "chat":
        return ChatStyle(tokenizer)
    if name == "few_shot":
        return FewShotStyle()
    raise ValueError(f"game.prompt_style must be chat or few_shot, got {name!r}")

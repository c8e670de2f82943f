"""Stand-ins at the game's wall: a generator that says what a test scripted, a tokenizer of code points."""

from __future__ import annotations

from collections.abc import Callable

from megatron_spice.game.records import Completion, Passage, Prompt, Sampling

GHANA = Passage(
    index=7,
    document=3,
    source="factbook",
    token_ids=(1, 2, 3),
    text="Ghana, formerly the Gold Coast, became independent in 1957. Its capital is Accra, "
    "and 33,846,114 people live there.",
)


class CodePoints:
    """A tokenizer whose ids are code points; a trusted piece is marked by a zero in front."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [
            number for segment in prompt for number in ([0] if segment.trusted else []) + [ord(c) for c in segment.text]
        ]

    def chat_wrapper(self, system: str | None) -> tuple[str, str]:
        return f"<system>{system}<user>", "<assistant>"


def text_of(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt)


class Scripted:
    """`script(prompt text, call number)` gives the texts of a call; a trailing "..." marks a cut completion."""

    def __init__(self, script: Callable[[str, int], list[str]]) -> None:
        self.script = script
        self.calls: list[tuple[str, int, Sampling]] = []

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        prompt = "".join(chr(number) for number in prompt_ids if number)
        self.calls.append((prompt, num_samples, sampling))
        texts = self.script(prompt, len(self.calls) - 1)[:num_samples]
        assert len(texts) == num_samples, "the script is too short"
        return [
            Completion(
                tuple(prompt_ids),
                tuple(ord(c) for c in text),
                tuple(-1.0 for _ in text),
                "length" if text.endswith("...") else "stop",
                text,
                "1",
            )
            for text in texts
        ]

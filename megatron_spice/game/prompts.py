"""What a prompt style is: everything about words. The rest of the game knows roles, tasks and answers, not how they
are asked for.

`chat` asks an instruction-tuned model for JSON, as the paper does; `few_shot` lets a small or base model go on after
worked examples. What a style must guarantee is the game's information asymmetry: `reasoner_prompt` is a function of
the question alone, and text that is not ours (a passage, a question) stands in untrusted segments.
"""

from __future__ import annotations

from typing import Protocol

from megatron_spice.game.records import AnswerType, InvalidReason, Passage, Prompt, Task


class PromptStyle(Protocol):
    """The wording of both roles."""

    name: str
    challenger_stop: tuple[str, ...]
    reasoner_stop: tuple[str, ...]

    def selection_prompt(self, passage: Passage) -> Prompt | None:
        """Asks which kind of task suits the passage; None when this style does not ask."""

    def parse_selection(self, text: str) -> AnswerType | None:
        """The kind that was chosen, None when the choice cannot be read."""

    def challenger_prompt(self, passage: Passage | None, answer_type: AnswerType) -> Prompt:
        """Asks for one task of a kind, from a passage or (`no_corpus`) from nothing."""

    def parse_task(self, text: str, answer_type: AnswerType) -> Task | InvalidReason:
        """The task that a completion states; its answer is not judged yet."""

    def reasoner_prompt(self, task: Task) -> Prompt:
        """Asks the question. Depends on `task.question` and on its being multiple choice, on nothing else of the
        task."""

    def grounded_prompt(self, task: Task, passage: Passage) -> Prompt:
        """Asks the question with the passage in view: for audits alone, never for what is trained on."""

    def extract_answer(self, text: str) -> str | None:
        """The final answer in a Reasoner's completion, None when there is none."""

"""Raw completion after worked examples: for base models, and for models too small to write JSON on request.

Measured on SmolLM2-135M: zero-shot JSON gave no valid task in 64, this form one in two. A task is two lines,

    Question: ...?
    Answer: ...

(MCQ has four option lines between them); a blank line ends it and is the Challenger's stop string, so a completion
holds exactly one. The kind of task is not asked for but drawn, and the Reasoner sees the same examples whatever the
kind is, but for multiple choice, which shows in the question itself.
"""

from __future__ import annotations

from megatron_spice.game.extract import answer_line
from megatron_spice.game.few_shot_examples import (
    CHALLENGER,
    QUESTION_OPENING,
    REASONER_FREE_FORM,
    REASONER_MCQ,
    Example,
)
from megatron_spice.game.options import letter_of
from megatron_spice.game.records import AnswerType, InvalidReason, Passage, Prompt, Segment, Task

_OPTION_LINES = 4


class FewShotStyle:
    """Two-line tasks, no chat template."""

    name = "few_shot"
    challenger_stop: tuple[str, ...] = ("\n\n",)
    reasoner_stop: tuple[str, ...] = ("\n",)

    def selection_prompt(self, passage: Passage) -> Prompt | None:
        """None: models that need this style cannot be asked to choose."""
        return None

    def parse_selection(self, text: str) -> AnswerType | None:
        """None: there is no selection."""
        return None

    def challenger_prompt(self, passage: Passage | None, answer_type: AnswerType) -> Prompt:
        """Examples with their passages, then this passage on one line (a blank line of its own would end an
        example)."""
        examples = CHALLENGER[answer_type]
        opening = f"Question: {QUESTION_OPENING.get(answer_type, '')}".rstrip()
        if passage is None:
            return (Segment("".join(map(_question_and_answer, examples)) + opening),)
        worked = "".join(f"Passage: {example.passage}\n{_question_and_answer(example)}" for example in examples)
        text = " ".join(passage.text.split())
        return (Segment(worked + "Passage:"), Segment(" " + text, trusted=False), Segment("\n" + opening))

    def parse_task(self, text: str, answer_type: AnswerType) -> Task | InvalidReason:
        """The task of a completion that goes on from the prompt; anything before, between or after its lines is
        unparsable."""
        text = QUESTION_OPENING.get(answer_type, "") + text
        lines = [line.strip() for line in text.strip().split("\n")]
        option_lines = _OPTION_LINES if answer_type == "MCQ" else 0
        if lines[0].startswith("Answer:"):
            return InvalidReason.EMPTY_QUESTION
        if len(lines) < 2 or not lines[-1].startswith("Answer:") or "Question:" in text:
            return InvalidReason.UNPARSABLE
        stem, options, answer = lines[0], lines[1:-1], lines[-1][len("Answer:") :].strip()
        if not stem.endswith("?") or stem == "?":
            return InvalidReason.UNPARSABLE
        if len(options) != option_lines:
            return InvalidReason.BAD_OPTIONS if option_lines else InvalidReason.UNPARSABLE
        question = "\n".join([stem, *options])
        gold = (letter_of(answer, question) or answer) if answer_type == "MCQ" else answer
        return Task(question, gold, answer_type)

    def reasoner_prompt(self, task: Task) -> Prompt:
        """Three answered questions, then this one."""
        examples = REASONER_MCQ if task.answer_type == "MCQ" else REASONER_FREE_FORM
        worked = "".join(map(_question_and_answer, examples))
        return (Segment(worked + "Question:"), Segment(" " + task.question, trusted=False), Segment("\nAnswer:"))

    def grounded_prompt(self, task: Task, passage: Passage) -> Prompt:
        """Three questions with their passages and answers, then the passage and the question."""
        examples = CHALLENGER["MCQ"] if task.answer_type == "MCQ" else (*CHALLENGER["String"][:2], CHALLENGER["Integer"][0])
        worked = "".join(f"Passage: {example.passage}\n{_question_and_answer(example)}" for example in examples)
        text, question = " ".join(passage.text.split()), task.question
        return (
            Segment(worked + "Passage:"), Segment(" " + text, trusted=False), Segment("\nQuestion:"),
            Segment(" " + question, trusted=False), Segment("\nAnswer:"),
        )  # fmt: skip

    def extract_answer(self, text: str) -> str | None:
        """The rest of the line after `Answer:`."""
        return answer_line(text)


def _question_and_answer(example: Example) -> str:
    return f"Question: {example.question}\nAnswer: {example.answer}\n\n"

"""The paper's way of asking [section 3.1, appendix E]: an instruction-tuned model answers in JSON, the Reasoner in a
box.

First the passage is judged: which kind of task suits it? Then comes the request for a hard task of that kind. The long
requests are in `challenger_requests.py`; here is how they are wrapped, and how answers are read.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_spice.game import challenger_requests as requests
from megatron_spice.game.chat_json import last_object
from megatron_spice.game.extract import last_boxed
from megatron_spice.game.options import letter_of, without_leaked_answer
from megatron_spice.game.records import AnswerType, InvalidReason, Passage, Prompt, Segment, Task, Tokenizer

SYSTEM = "You are a helpful assistant."
_BOX_REQUEST = "\n\nReason step by step, then give your final answer within \\boxed{}."
_FREE_FORM = ("Integer", "Expression", "String")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # half a surrogate pair: JSON can spell it, no tokenizer or UTF-8 file takes it


class ChatStyle:
    """JSON prompts inside the model's own chat template."""

    name = "chat"
    challenger_stop: tuple[str, ...] = ()
    reasoner_stop: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._before, self._after = tokenizer.chat_wrapper(SYSTEM)

    def _wrap(self, *segments: Segment) -> Prompt:
        return (Segment(self._before), *segments, Segment(self._after))

    def _document(self, passage: Passage) -> tuple[Segment, ...]:
        # A passage that spells the end marker could pretend that what follows comes from us.
        text = passage.text.replace(requests.DOCUMENT_END, "").replace(requests.DOCUMENT_BEGIN, "")
        return (
            Segment(f"\n\n{requests.DOCUMENT_BEGIN}\n"),
            Segment(text, trusted=False),
            Segment(f"\n{requests.DOCUMENT_END}"),
        )

    def selection_prompt(self, passage: Passage) -> Prompt | None:
        """Asks for the kind of task, as JSON."""
        return self._wrap(Segment(requests.SELECTION), *self._document(passage))

    def parse_selection(self, text: str) -> AnswerType | None:
        """The kind; None unless exactly one of the two booleans is true and a free-form kind is named where it must
        be."""
        choice = last_object(text)
        if choice is None:
            return None
        mcq, free_form = choice.get("suitable_for_mcq"), choice.get("suitable_for_free_form")
        if mcq is True and free_form is False:
            return "MCQ"
        kind = choice.get("best_answer_type")
        return kind if free_form is True and mcq is False and kind in _FREE_FORM else None

    def challenger_prompt(self, passage: Passage | None, answer_type: AnswerType) -> Prompt:
        """The request for one task; the document comes last, so that the request reads the same for every passage."""
        request = Segment(requests.task_request(answer_type, with_document=passage is not None))
        return self._wrap(request) if passage is None else self._wrap(request, *self._document(passage))

    def parse_task(self, text: str, answer_type: AnswerType) -> Task | InvalidReason:
        """The task of the last JSON object; empty question and answer are the model's way of declining the document."""
        fields = last_object(text)
        if fields is None or any(isinstance(value, str) and _HALF_PAIR.search(value) for value in fields.values()):
            return InvalidReason.UNPARSABLE
        return _multiple_choice(fields) if answer_type == "MCQ" else _free_form(fields, answer_type)

    def reasoner_prompt(self, task: Task) -> Prompt:
        """The question, the request to reason, and the box."""
        return self._wrap(Segment(task.question, trusted=False), Segment(_BOX_REQUEST))

    def grounded_prompt(self, task: Task, passage: Passage) -> Prompt:
        """The document, then the question as the Reasoner is asked it."""
        opening = Segment("Answer the question that follows the document, from what the document says.")
        question = (Segment("\n\n"), Segment(task.question, trusted=False), Segment(_BOX_REQUEST))
        return self._wrap(opening, *self._document(passage), *question)

    def extract_answer(self, text: str) -> str | None:
        """What the last complete box holds."""
        return last_boxed(text) or None


def _multiple_choice(fields: dict[str, Any]) -> Task | InvalidReason:
    question, letter = fields.get("multiple_choice_question"), fields.get("multiple_choice_correct")
    if not isinstance(question, str) or not isinstance(letter, str):
        return InvalidReason.UNPARSABLE
    if not question.strip() and not letter.strip():
        return InvalidReason.UNSUITABLE
    question = _plain_question(without_leaked_answer(question))
    gold = letter_of(letter, question) if letter.strip() else ""
    return Task(question, letter.strip() if gold is None else gold, "MCQ")


def _free_form(fields: dict[str, Any], answer_type: AnswerType) -> Task | InvalidReason:
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or "answer" not in fields:
        return InvalidReason.UNPARSABLE
    if not question.strip() and answer in ("", None):
        return InvalidReason.UNSUITABLE
    if fields.get("answer_type") != answer_type or isinstance(answer, (bool, list, dict)):
        return InvalidReason.WRONG_TYPE
    return Task(_plain_question(question), "" if answer is None else str(answer).strip(), answer_type)


def _plain_question(question: str) -> str:
    question = question.strip()
    return question[len("Question:") :].strip() if question.startswith("Question:") else question

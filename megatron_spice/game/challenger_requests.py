"""What the Challenger is asked in the `chat` style: our wording of the requirements of the paper's appendix E.

Words only. `prompts_chat.py` reads the JSON that these requests describe; change both together.
"""

from __future__ import annotations

from megatron_spice.game.records import AnswerType

DOCUMENT_BEGIN = "=== BEGIN DOCUMENT ==="
DOCUMENT_END = "=== END DOCUMENT ==="

SELECTION = """You will see a document. Decide which kind of hard exam question it supports best. Do not write the \
question.

Multiple choice fits when the document has relations between several facts, so that answering takes more than one \
step and \
three wrong options can be made to look right.
Free form fits when there is exactly one clear answer of one of these types:
- Integer: the result of a definite calculation or count
- Expression: a formula that can be derived
- String: an exact term, name or label

Choose one of the two, never both. Reply with this JSON object and nothing else, no markdown and no backticks:
{"suitable_for_mcq": true or false, "suitable_for_free_form": true or false, \
"best_answer_type": "Integer" or "Expression" or "String" or null, "reason": "under 100 plain characters"}"""

_FROM_DOCUMENT = (
    """You write exam questions from documents. Below is a document; the student who takes the exam never sees it."""
)
_FROM_NOTHING = """You write exam questions. Pick a subject from mathematics, science or general knowledge yourself."""

_SELF_CONTAINED = """Write the question so that it stands alone: state every fact and definition it needs, and \
never point at a source \
(no "according to the text", "in the document", "the passage says", "as mentioned above")."""

_MCQ = """Make one HARD multiple choice question with four options.

Work through these steps before you answer:
1. Collect at least three pieces of information that have to be combined: relations across sections, calculations \
of several \
steps, rules with conditions, trade-offs, conclusions that are only implied. Leave single facts and definitions alone.
2. Plan the difficulty: name the easy version you will avoid, which layers you add, which ideas you join, which \
shortcuts you close.
3. {self_contained}
4. Aim for four or more ideas in one question. Looking up one fact or matching a keyword must not answer it.
5. Write four options A) to D): like in length (within a fifth), the same units and form, neutral. The wrong ones \
come from \
typical mistakes and half-finished reasoning. Put the right one at a letter chosen by chance.
6. Solve it as a student would. If elimination, guessing or fewer than three steps suffice, make it harder.
7. Check that exactly one option is right.

Then write one JSON object, without a code fence, with these fields:
"identified_answer": the answer in words,
"answer_quote": list of the sentences it rests on,
"hardening_process": how you made it hard,
"exam_question": the question without its options,
"correct_answer": the text of the right option,
"multiple_choice_question": the question, then the lines A) ..., B) ..., C) ..., D) ..., without saying which is right,
"multiple_choice_correct": "A", "B", "C" or "D",
"self_test_solution": your solution,
"knowledge_and_reasoning_steps": the steps it takes,
"question_difficulty": "HARD" or "EXTRA HARD"
{unsuitable}"""
_MCQ_UNSUITABLE = """If no such question can be made, leave exam_question, correct_answer, multiple_choice_question \
and \
multiple_choice_correct as empty strings."""

_FREE_FORM = """Make one HARD question whose answer is of type {answer_type}.

{type_rule}

Work through these steps before you answer:
1. Collect at least three pieces of information that lead to an answer of this type.
2. Plan the difficulty: join three or more ideas, so that no single sentence gives the answer away.
3. {self_contained}
4. Fix the answer's precision, unit and form in the question.
5. Solve your own question step by step and compare.
6. Rate the difficulty; make it harder if a student would need under three steps.
7. Check that exactly one answer is right.

Then write one JSON object, without a code fence, with these fields:
"identified_information": list of three or more facts,
"relevant_quotes": list of sentences,
"hardening_process": how you made it hard,
"question": the question as one string (never a list),
"answer": the answer alone, a single value (never a list or an object),
"answer_type": "{answer_type}",
"step_by_step_solution": your solution,
"intermediate_results": object of named values,
"difficulty_level": "Hard" or "Extra Hard",
"difficulty_justification": why,
"solving_time_estimate": minutes,
"required_concepts": list,
"potential_errors": list
{unsuitable}"""
_FREE_FORM_UNSUITABLE = """If no such question can be made, leave question and answer as empty strings."""

_TYPE_RULES = {
    "Integer": "Integer: a whole number and nothing else, such as 42. "
    "The unit belongs in the question, not in the answer.",
    "Expression": "Expression: one formula in standard notation, such as 2*x^2 + 3*x - 5, as a plain string in its "
    "simplest form. The question defines every variable.",
    "String": "String: one to three words, a term, name or label, without any explanation.",
}


def task_request(answer_type: AnswerType, with_document: bool) -> str:
    """The request for one task of a kind; without a document (`no_corpus`) the model chooses the subject itself."""
    opening = _FROM_DOCUMENT if with_document else _FROM_NOTHING
    if answer_type == "MCQ":
        body = _MCQ.replace("{self_contained}", _SELF_CONTAINED)
        body = body.replace("{unsuitable}", _MCQ_UNSUITABLE if with_document else "")
    else:
        body = _FREE_FORM.replace("{self_contained}", _SELF_CONTAINED).replace("{answer_type}", answer_type)
        body = body.replace("{type_rule}", _TYPE_RULES[answer_type])
        body = body.replace("{unsuitable}", _FREE_FORM_UNSUITABLE if with_document else "")
    return f"{opening} {body}".rstrip()

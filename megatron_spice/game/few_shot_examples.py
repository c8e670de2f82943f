"""Worked examples for raw completion: three a kind of task, short, about commonplace things.

They are the whole instruction a small base model gets, so each shows what is wanted: a question that stands alone and
an answer copied from its passage. Short, because they are in front of every passage of a kind.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_spice.game.records import AnswerType


class Example(NamedTuple):
    """A passage and the task made from it; `question` has its options on lines of its own for MCQ."""

    passage: str
    question: str
    answer: str


CHALLENGER: dict[AnswerType, tuple[Example, ...]] = {
    "String": (
        Example(
            "Honey bees live in hives. They turn nectar into honey.", "What do honey bees turn into honey?", "nectar"
        ),
        Example(
            "Paris lies on the Seine. It has been the capital of France for centuries.",
            "Which river flows through Paris?",
            "Seine",
        ),
        Example("The piano was invented in Italy by Cristofori, around 1700.", "Who invented the piano?", "Cristofori"),
    ),
    "Integer": (
        Example("A spider has 8 legs and no wings.", "How many legs does a spider have?", "8"),
        Example("Mount Fuji, in Japan, is 3,776 metres high.", "How many metres high is Mount Fuji?", "3,776"),
        Example("Norway is divided into 15 counties.", "How many counties does Norway have?", "15"),
    ),
    "Expression": (
        Example("A square with side s has four equal sides.", "What is the area of a square with side s?", "s^2"),
        Example(
            "A taxi costs 3 euros and 2 euros more for every kilometre.",
            "What do k kilometres by taxi cost in euros?",
            "3 + 2*k",
        ),
        Example("A circle has radius r.", "What is the circumference of a circle with radius r?", "2*pi*r"),
    ),
    "MCQ": (
        Example(
            "Bees turn nectar into honey.", "What do bees make from nectar?\nA) milk\nB) silk\nC) honey\nD) sugar", "C"
        ),
        Example(
            "The Seine flows through Paris.",
            "Which river flows through Paris?\nA) Seine\nB) Rhine\nC) Tiber\nD) Ebro",
            "A",
        ),
        Example("A spider has 8 legs.", "How many legs does a spider have?\nA) 4\nB) 6\nC) 10\nD) 8", "D"),
    ),
}

# What the Challenger's question begins with, given as part of the prompt. With these examples SmolLM2-135M's Integer
# tasks were valid 11 times in 64 without it and 18 times in 64 with it. The price: counts and measures, no years.
QUESTION_OPENING: dict[AnswerType, str] = {"Integer": "How many"}

# The same for every kind but MCQ: the Reasoner learns nothing of the answer from its examples.
REASONER_FREE_FORM = (
    Example("", "Which river flows through Paris?", "Seine"),
    Example("", "How many legs does a spider have?", "8"),
    Example("", "What do honey bees turn into honey?", "nectar"),
)
REASONER_MCQ = CHALLENGER["MCQ"]

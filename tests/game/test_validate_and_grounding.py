from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.grounding import is_grounded, refers_to_passage
from megatron_spice.game.prompts_few_shot import FewShotStyle
from megatron_spice.game.records import Completion, InvalidReason, Task
from megatron_spice.game.validate import check_switches, check_task, read_attempt
from scripted_game import GHANA

OPTIONS = "\nA) 5\nB) 6\nC) 7\nD) 8"


@pytest.mark.parametrize(
    ("kind", "question", "answer", "reason"),
    [
        ("String", "What?", "Accra", None),
        ("String", "What?", "one two three", None),
        ("String", "What?", "one two three four", InvalidReason.LONG_STRING),
        ("String", "What?", "x" * 500, InvalidReason.LONG_STRING),
        ("String", " ", "Accra", InvalidReason.EMPTY_QUESTION),
        ("String", "What?", " ", InvalidReason.EMPTY_ANSWER),
        ("String", "What?", "...", InvalidReason.EMPTY_ANSWER),
        ("Integer", "How many?", "-1,234", None),
        ("Integer", "How many?", "+7", None),
        ("Integer", "How many?", "1,23", InvalidReason.BAD_INTEGER),
        ("Integer", "How many?", "3 apples", InvalidReason.BAD_INTEGER),
        ("Integer", "How many?", "4.0", InvalidReason.BAD_INTEGER),
        ("Integer", "How many?", "9" * 900, InvalidReason.BAD_INTEGER),
        ("Expression", "What is it?", "2*x^2 + 1", None),
        ("Expression", "What is it?", "2*(x", InvalidReason.BAD_EXPRESSION),
        ("Expression", "What is it?", "the area", InvalidReason.BAD_EXPRESSION),
        ("MCQ", f"How many?{OPTIONS}", "C", None),
        ("MCQ", "How many?", "C", InvalidReason.BAD_OPTIONS),
        ("MCQ", f"How many?{OPTIONS}", "E", InvalidReason.BAD_LETTER),
    ],
)
def test_rules_of_each_kind(kind, question, answer, reason):
    assert check_task(Task(question, answer, kind)) == reason


def test_a_cut_completion_is_never_a_task():
    text = " What is it?\nAnswer: Accra"
    style = FewShotStyle()
    for finish in ("length", "abort"):
        assert read_attempt(Completion((), (), (), finish, text), "String", style) == InvalidReason.TRUNCATED
    assert isinstance(read_attempt(Completion((), (), (), "stop", text), "String", style), Task)


@pytest.mark.parametrize(
    ("kind", "question", "answer", "grounded"),
    [
        ("String", "What is the capital?", "Accra", True),
        ("String", "What is the capital?", "ACCRA.", True),
        ("String", "What was it?", "gold coast", True),
        ("String", "What is the capital?", "Acc", False),  # no word of its own
        ("String", "What is the capital?", "Kumasi", False),
        ("String", "Is Accra the capital?", "Accra", False),  # given away
        ("Integer", "When?", "1957", True),
        ("Integer", "How many?", "33846114", True),
        ("Integer", "How many?", "33,846,114", True),
        ("Integer", "How many?", "846", False),  # part of a number
        ("Integer", "How many?", "195", False),
        ("Integer", "When was 1957?", "1957", False),
        ("MCQ", "When?\nA) 1957\nB) 1958\nC) 1959\nD) 1960", "A", True),
        ("MCQ", "When?\nA) 1957\nB) 1958\nC) 1959\nD) 1960", "B", False),
        ("MCQ", "Was it 1957?\nA) 1957\nB) 1958\nC) 1959\nD) 1960", "A", False),
        ("MCQ", "Which capital?\nA) Kumasi\nB) Accra\nC) Tema\nD) Ho", "B", True),
    ],
)
def test_grounding(kind, question, answer, grounded):
    assert is_grounded(Task(question, answer, kind), GHANA.text) is grounded


@given(st.sampled_from(GHANA.text.replace(",", "").replace(".", "").split()))
def test_every_word_of_the_passage_is_grounded(word):
    assert is_grounded(Task("?", word, "String"), GHANA.text) or word.isdigit()


@pytest.mark.parametrize(
    ("question", "refers"),
    [
        ("According to the passage, what is it?", True),
        ("What is described in the text?", True),
        ("What does the document say about gold?", True),
        ("As mentioned above, what is it?", True),
        ("Based on this article, when was it?", True),
        ("What is the capital of Ghana?", False),
        ("Who wrote the text of the anthem?", False),
        ("How does a passage grave look?", False),
    ],
)
def test_references(question, refers):
    assert refers_to_passage(question) is refers


def test_switches():
    task, pointing = Task("What?", "x", "String"), Task("What is in the text?", "x", "String")
    assert check_switches(task, False, GameConfig()) is None
    assert check_switches(pointing, False, GameConfig()) is None
    assert check_switches(task, False, GameConfig(grounding="span")) == InvalidReason.UNGROUNDED
    assert check_switches(task, True, GameConfig(grounding="span")) is None
    assert check_switches(task, None, GameConfig(grounding="span")) is None
    assert check_switches(pointing, True, GameConfig(reject_references=True)) == InvalidReason.REFERS_TO_PASSAGE

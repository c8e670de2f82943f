"""The audits of self-written tasks: laws, and planted cases that each must find and nothing else may."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.game.audit import bias
from megatron_spice.game.audit.duplicates import NEAR, Seen, overlap, shingles
from megatron_spice.game.audit.flags import flags_of
from megatron_spice.game.audit.metrics import Audit
from megatron_spice.game.audit.reanswer import STEM, options_alone
from megatron_spice.game.audit.spans import copied_words, longest_span
from megatron_spice.game.audit.words import words
from megatron_spice.game.episodes import episode_record
from megatron_spice.game.records import Answer, Attempt, Completion, Episode, Passage, Task, Verdict

WORDS = "river country export million people capital north coast gold trade island border law court age rate".split()
TEXT = st.lists(st.sampled_from(WORDS), max_size=30)
SAID = Completion((), (), (), "stop", "")


def task(question: str, gold: str = "Accra", kind: str = "String") -> Task:
    return Task(question, gold, kind)


def question(rng: random.Random, length: int = 14) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(length))


@given(TEXT, TEXT)
def test_the_longest_span_is_what_a_search_of_all_finds(one, other):
    runs = {tuple(other[start:end]) for start in range(len(other)) for end in range(start + 1, len(other) + 1)}
    expected = max((end - start for start in range(len(one)) for end in range(start + 1, len(one) + 1) if tuple(one[start:end]) in runs), default=0)
    assert longest_span(one, other) == longest_span(other, one) == expected


@given(TEXT, TEXT, TEXT)
def test_what_is_copied_is_found_whatever_stands_around_it(before, copied, after):
    passage = f"Once {' '.join(copied)}, it was said."
    asked = f"{' '.join(before)} - {' '.join(copied).upper()}! {' '.join(after)}?"
    assert copied_words(asked, passage) >= len(copied)


def test_words_are_compared_without_case_and_punctuation():
    assert words("The Volta, 1,957.5 km (approx.)") == ["the", "volta", "1,957.5", "km", "approx"]


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=1, max_size=20))
@settings(max_examples=50)
def test_a_question_is_exact_when_it_was_asked_and_near_only_when_it_overlaps(questions):
    seen = Seen()
    earlier: list[str] = []
    for each in (" ".join(found) for found in questions):
        kind = seen.add(each)
        best = max((overlap(shingles(each), shingles(other)) for other in earlier), default=0.0)
        assert (kind == "exact") == (each in earlier)
        if kind == "near":
            assert best >= NEAR
        if best < NEAR:
            assert kind is None
        earlier.append(each)


def test_planted_near_duplicates_are_found_among_thousands_of_others():
    rng = random.Random(0)
    seen = Seen()
    planted = [question(rng, 20) for _ in range(100)]
    assert not any(seen.add(each) for each in planted)
    assert not any(seen.add(question(rng, 20)) for _ in range(2000))
    changed = [f"{each} indeed" for each in planted]  # overlap 18 of 19
    found = Counter(seen.add(each) for each in changed)
    assert found["near"] == 100
    assert Counter(seen.add(f"  {each.upper()}?") for each in planted) == {"exact": 100}


@given(st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=30)
def test_memory_is_bounded_and_the_newest_are_remembered(size, asked):
    rng, seen = random.Random(asked), Seen(size)
    questions = [question(rng) for _ in range(asked)]
    for each in questions:
        seen.add(each)
    assert len(seen) == min(size, len(set(questions)))
    assert all(seen.add(each) == "exact" for each in questions[-size:])
    assert sum(len(band) for band in seen._bands.values()) == 8 * len(seen)


@given(st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_letter_bias_is_pearsons_and_none_where_all_are_equal(counts):
    statistic, chance = bias.letter_bias(dict(zip("ABCD", counts)))
    mean = sum(counts) / 4
    assert 0 <= chance <= 1
    if mean:
        assert statistic == pytest.approx(sum((count - mean) ** 2 for count in counts) / mean)
    if len(set(counts)) == 1:
        assert (statistic, chance) == (0.0, 1.0)


@pytest.mark.parametrize(("statistic", "chance"), [(7.814728, 0.05), (11.344867, 0.01), (16.266236, 0.001), (2.365974, 0.5)])
def test_the_survival_function_has_the_tables_values(statistic, chance):
    assert bias._survival_of_3(statistic) == pytest.approx(chance, rel=1e-5)


def test_a_planted_letter_bias_is_found_and_chance_is_not():
    rng = random.Random(1)
    fair = Counter(rng.choice("ABCD") for _ in range(400))
    assert bias.letter_bias(fair)[1] > 0.01
    assert bias.letter_bias({**fair, "C": fair["C"] + 60})[1] < 1e-4


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_constant_gold_is_the_share_met_by_the_favourite_so_far(golds):
    share = bias.constant_share(golds)
    if len(golds) < 2:
        assert share is None
        return
    met = sum(Counter(golds[:place]).most_common(1)[0][0] == gold for place, gold in enumerate(golds) if place)
    assert abs(share * len(golds) - met) <= sum(_tied(golds[:place]) for place in range(len(golds)))
    if len(set(golds)) == 1:
        assert share == (len(golds) - 1) / len(golds)
    if len(set(golds)) == len(golds):
        assert share == 0.0


def _tied(golds):
    ranked = Counter(golds).most_common(2)
    return len(ranked) == 2 and ranked[0][1] == ranked[1][1]


def test_gold_that_follows_from_the_questions_form_is_told_from_a_constant():
    asked = ["How many people?", "Which river?"] * 20
    golds = ["3", "Volta"] * 20
    assert bias.constant_share(golds) <= 0.5
    assert bias.form_share([bias.form_of(each) for each in asked], golds) == 38 / 40


def test_answers_drawn_by_chance_are_met_by_chance():
    rng = random.Random(2)
    golds = [rng.choice("0123456789") for _ in range(2000)]
    forms = [rng.choice("abcd") for _ in golds]
    assert 0.07 < bias.constant_share(golds) < 0.13
    assert 0.07 < bias.form_share(forms, golds) < 0.13


@pytest.mark.parametrize(("asked", "gold", "kind", "raised"), [
    ("Which river feeds the lake?", "Volta", "String", []),
    ("According to the passage, which river feeds it?", "Volta", "String", ["refers"]),
    ("Which river, the Volta or another, feeds the lake?", "Volta", "String", ["gives_away"]),
    ("Is it true that the Volta feeds the largest of the artificial lakes of the world?", "yes", "String", ["copied"]),
    ("How many lakes, of 12?", "12", "Integer", ["gives_away"]),
    ("What feeds it?\nA) Volta\nB) Rhine\nC) Nile\nD) Ebro", "A", "MCQ", []),
    ("What feeds the Volta lake?\nA) Volta\nB) Rhine\nC) Nile\nD) Ebro", "A", "MCQ", ["gives_away"]),
])  # fmt: skip
def test_flags(asked, gold, kind, raised):
    passage = "The Volta feeds the largest of the artificial lakes of the world, one of 12."
    assert flags_of(task(asked, gold, kind), passage).names() == raised
    assert "copied" not in flags_of(task(asked, gold, kind), None).names()


def test_options_alone_hide_the_question_and_keep_the_letters():
    mcq = task("What feeds the lake?\nA) Volta\nB) Aare\nC) Nile\nD) Ebro", "A", "MCQ")
    bare = options_alone(mcq)
    assert bare.question == f"{STEM}\nA) Volta\nB) Aare\nC) Nile\nD) Ebro" and bare.gold_answer == "A"
    assert "lake" not in bare.question and options_alone(task("What?")) is None
    assert bias.is_longest_option(mcq) is True and bias.is_longest_option(task("What?")) is None


@given(st.lists(st.lists(st.sampled_from(WORDS[:4]), min_size=1, max_size=5), min_size=2, max_size=6), st.integers(1, 4), st.data())
@settings(max_examples=50)
def test_a_resumed_audit_gives_the_numbers_of_one_that_never_stopped(iterations, passages, data):
    def played(number: int, asked: list[str]) -> list[Episode]:
        # The first was put off: it counts in this iteration, and was begun, in the last slot, in the one before.
        begun = [(number - 1 if place == 0 else number, 9 if place == 0 else place) for place in range(len(asked))]
        return [
            replace(episode(Attempt(SAID, task(each), None), Attempt(SAID, None, None)), iteration=number, begun=when, slot=slot)
            for each, (when, slot) in zip(asked, begun)
        ]

    live, log = Audit(passages, 5), []
    for number, asked in enumerate(iterations, start=1):
        episodes = played(number, asked)
        resumed = Audit(passages, 5)
        resumed.remember(log)
        assert resumed.metrics(episodes) == live.metrics(episodes)
        log += data.draw(st.permutations([json.loads(json.dumps(episode_record(each))) for each in episodes]))


def test_a_question_beyond_the_audited_passages_is_not_remembered_on_resume():
    unseen = replace(episode(Attempt(SAID, task("Beyond?"), None)), slot=1)
    records = [episode_record(each) for each in (episode(Attempt(SAID, task("Within?"), None)), unseen)]
    resumed = Audit(passages=1, memory=100)
    resumed.remember(records)
    values = resumed.metrics([episode(Attempt(SAID, task("Beyond?"), None), Attempt(SAID, task("Within?"), None))])
    assert values["audit/duplicates"] == 0.5


def test_tasks_that_could_not_be_asked_again_are_counted():
    read = Attempt(SAID, task("A?"), None, is_reasoner_task=True, grounded_answers=(Answer(SAID, Verdict(True, "", "exact"), 1.0),))
    unread, other = Attempt(SAID, task("B?"), None, is_reasoner_task=True), Attempt(SAID, task("C?"), None)
    episodes = [episode(read, other), episode(unread)]
    values = Audit(4, 100, asks_again=True).metrics(episodes)
    assert values["audit/not_asked"] == 0.5 and values["audit/agreement"] == 1.0
    assert "audit/not_asked" not in Audit(4, 100).metrics(episodes)
    assert "audit/not_asked" not in Audit(4, 100, has_corpus=False, asks_again=True).metrics(episodes)


def answers(pattern: str) -> tuple[Answer, ...]:
    return tuple(Answer(SAID, Verdict(each == "1", "", "exact"), float(each)) for each in pattern)


def episode(*attempts: Attempt, text: str = "The Volta flows.") -> Episode:
    return Episode(1, 0, Passage(0, 0, "s", (), text), "few_shot", "String", attempts)


def test_an_iterations_numbers_are_those_of_planted_tasks():
    valid = [
        Attempt(SAID, task("Which river flows?", "Volta"), None, answers=answers("1110"), grounded_answers=answers("1000")),
        Attempt(SAID, task("Which river flows?", "Volta"), None),
        Attempt(SAID, task("In the text, which one?", "Nile"), None),
        Attempt(SAID, task("A?\nA) w\nB) x\nC) yyy\nD) z", "C", "MCQ"), None, options_only_answers=answers("10")),
    ]
    audit = Audit(passages=1, memory=100)
    values = audit.metrics([episode(*valid, Attempt(SAID, None, None)), episode(Attempt(SAID, task("Beyond?"), None))])
    assert values["audit/tasks"] == 4
    assert values["audit/duplicates"] == 0.25 and values["audit/near_duplicates"] == 0
    assert values["audit/refers"] == 0.25 and values["audit/copied"] == 0
    assert values["audit/constant_gold"] == 0.25
    assert values["audit/form_gold"] == 0.25
    assert values["audit/letter_most"] == 1.0 and values["audit/letter_chi2"] == 3.0
    assert values["audit/longest_option"] == 1.0
    assert values["audit/agreement"] == 0.25 and values["audit/pass_minus_agreement"] == 0.5
    assert values["audit/options_only"] == 0.5
    again = audit.metrics([episode(valid[0])])
    assert again["audit/duplicates"] == 1.0, "questions are remembered from iteration to iteration"
    assert Audit(1, 100).metrics([episode(Attempt(SAID, None, None))]) == {"audit/tasks": 0.0}

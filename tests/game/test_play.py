"""A passage played with a scripted engine and the real verifier: Algorithm 1's rules, one by one."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter

import pytest

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.audit.reanswer import reanswered
from megatron_spice.game.episodes import episode_record, metrics, trajectories
from megatron_spice.game.play import Table, Wording, play_passage
from megatron_spice.game.records import InvalidReason
from megatron_spice.game.rewards import challenger_reward
from scripted_game import GHANA, CodePoints, Scripted, text_of

VALID = " What is the capital of number {0}?\nAnswer: Accra"
INVALID = " nonsense {0}"


def _few_shot(**settings):
    return GameConfig(
        **{
            "prompt_style": "few_shot",
            "answer_types": ["String"],
            "group_size": 4,
            "attempt_chunk": 4,
            "attempts": 32,
            **settings,
        }
    )


@pytest.fixture
def play(loop, verifier):
    def play(script, config, slot=0, seed=0, iteration=1, context=None):
        engine = Scripted(script)
        coroutine = play_passage(
            GHANA, iteration=iteration, slot=slot, engine=engine, tokenizer=CodePoints(), verifier=verifier,
            config=config,
            temperature=1.0, top_p=1.0, seed=seed, context=context,
        )  # fmt: skip
        return loop.run_until_complete(coroutine), engine

    return play


def _script(chunks, right_by_question=lambda question: 2, answers=4):
    """Challenger texts chunk by chunk; the Reasoner is right so many times."""
    chunks = iter(chunks)

    def script(prompt, call):
        if prompt.endswith("Answer:"):
            right = right_by_question(prompt.rsplit("Question:", 1)[1])
            return [" Accra"] * right + [" Lagos"] * (answers - right)
        return next(chunks)

    return script


def _texts(pattern):
    return [(VALID if letter == "v" else INVALID).format(index) for index, letter in enumerate(pattern)]


def test_a_question_that_leaves_the_reasoner_no_room_is_no_task(play):
    """An engine would refuse it, and be taken for a lost one."""
    short, long = VALID.format(1), VALID.format("7" * 300)
    prompts = [len(CodePoints().encode_prompt(_reasoner_prompt(text))) for text in (short, long)]
    for context, valid in ((prompts[1] + 16, [True, True, False, True]), (prompts[1] + 15, [True, False, False, True]), (None, [True, True, False, True])):
        texts = [short, long, INVALID, VALID.format(3)]
        episode, engine = play(_script([texts]), _few_shot(reasoner_max_tokens=16), context=context)
        assert [attempt.task is not None for attempt in episode.attempts] == valid
        assert (episode.attempts[1].invalid == InvalidReason.LONG_QUESTION) == (not valid[1])
        assert prompts[0] < prompts[1] and any("7" * 300 in prompt for prompt, *_ in engine.calls) == valid[1]


def _reasoner_prompt(text):
    style = Wording.of("few_shot", CodePoints()).style
    return style.reasoner_prompt(style.parse_task(text, "String"))


def test_one_passage_whole(play):
    episode, engine = play(_script([_texts("vivi")]), _few_shot())
    assert [attempt.task is not None for attempt in episode.attempts] == [True, False, True, False]
    assert all(attempt.in_group for attempt in episode.attempts)
    assert [attempt.reward for attempt in episode.attempts] == [1.0, -0.1, 1.0, -0.1]
    assert [attempt.advantage for attempt in episode.attempts] == pytest.approx([0.55, -0.55, 0.55, -0.55])
    assert episode.attempts[1].invalid == InvalidReason.UNPARSABLE and not episode.attempts[1].answers
    chosen = [attempt for attempt in episode.attempts if attempt.is_reasoner_task]
    assert len(chosen) == 1 and chosen[0].task is not None
    assert [answer.advantage for answer in chosen[0].answers] == [0.5, 0.5, -0.5, -0.5]
    other = next(attempt for attempt in episode.attempts if attempt.task and not attempt.is_reasoner_task)
    assert len(other.answers) == 4 and all(answer.advantage is None for answer in other.answers)
    assert episode.attempts[0].grounded is True
    assert len(engine.calls) == 3  # its answers are re-used, not sampled again


@pytest.mark.parametrize(
    ("chunks", "settings", "attempts"),
    [
        (["vvvv"], {}, 4),
        (["iiii", "iivi"], {}, 8),  # until one is valid
        (["vv", "ii"], {"attempt_chunk": 2}, 4),  # until there are G
        (["iiii", "iiii", "ii"], {"attempts": 10}, 10),  # at most N
        (["vi"], {"attempts": 2}, 2),
    ],
)
def test_the_stop_rule(play, chunks, settings, attempts):
    episode, engine = play(_script(map(_texts, chunks)), _few_shot(**settings))
    assert len(episode.attempts) == attempts
    assert sum(attempt.in_group for attempt in episode.attempts) == min(4, attempts)


def test_the_group_keeps_the_ratio_and_only_its_tasks_are_answered(play):
    episode, engine = play(_script([_texts("vvvviiiiiiiiiiii")]), _few_shot(attempt_chunk=16, attempts=16))
    group = [attempt for attempt in episode.attempts if attempt.in_group]
    assert Counter(attempt.task is not None for attempt in group) == {True: 1, False: 3}
    assert sum(bool(attempt.answers) for attempt in episode.attempts) == 1
    outside = [attempt for attempt in episode.attempts if not attempt.in_group]
    assert all(attempt.reward is None and attempt.advantage is None for attempt in outside)


def test_without_a_valid_attempt_nothing_pulls(play):
    config = _few_shot(attempts=8)
    episode, engine = play(_script([_texts("iiii"), _texts("iiii")]), config)
    assert len(engine.calls) == 2
    assert {attempt.reward for attempt in episode.attempts if attempt.in_group} == {-0.1}
    assert {attempt.advantage for attempt in episode.attempts if attempt.in_group} == {0.0}
    trained = trajectories([episode], config)
    assert [trajectory.role for trajectory in trained] == ["challenger"] * 4
    values = metrics([episode])
    assert values["challenger/valid_share"] == 0.0 and values["game/passages_without_task"] == 1.0
    assert "reasoner/pass_rate" not in values and values["challenger/invalid/unparsable"] == 1.0


def test_the_reasoners_task_is_uniform_over_valid_ones_whatever_they_pay(play):
    right = {"0": 0, "1": 2, "2": 4, "3": 1}
    counts = Counter()
    for slot in range(400):
        episode, _ = play(
            _script([_texts("vvvv")], lambda question: right[question.split("?")[0][-1]]), _few_shot(), slot=slot
        )
        counts[[attempt.is_reasoner_task for attempt in episode.attempts].index(True)] += 1
    assert sorted(counts) == [0, 1, 2, 3] and all(abs(count - 100) < 44 for count in counts.values())  # five deviations


def test_choices_depend_on_seed_iteration_and_slot_only(play):
    def choices(**where):
        episode, engine = play(_script([_texts("vvvviiii" * 2)]), _few_shot(attempt_chunk=16), **where)
        return [(attempt.in_group, attempt.is_reasoner_task) for attempt in episode.attempts], [
            call[2].seed for call in engine.calls
        ]

    assert choices(seed=3, slot=2) == choices(seed=3, slot=2)
    assert (
        len(
            {
                str(choices(seed=seed, slot=slot, iteration=turn))
                for seed in (0, 1)
                for slot in (0, 1)
                for turn in (1, 2)
            }
        )
        == 8
    )


@pytest.mark.parametrize("kind", ["variance", "threshold", "r_zero", "absolute_zero"])
def test_every_reward_follows_from_the_log_line(play, kind):
    """Nothing but the JSON line and the recipe: validity, verdicts, rewards and advantages fit together."""
    right = {"0": 0, "1": 1, "2": 3, "3": 4, "4": 2}
    config = _few_shot(challenger_reward=kind, attempt_chunk=10, group_size=8)
    script = _script([_texts("vvvvviiiii")], lambda question: right[question.split("?")[0][-1]], answers=8)
    episode, _ = play(script, config)
    record = json.loads(json.dumps(episode_record(episode)))
    assert record["passage"] == {"index": 7, "document": 3, "source": "factbook", "text": GHANA.text}
    assert (record["iteration"], record["prompt_style"]) == (1, "few_shot")

    group = [attempt for attempt in record["attempts"] if attempt["in_group"]]
    for attempt in record["attempts"]:
        assert attempt["valid"] == (attempt["task"] is not None) == (attempt["invalid"] is None)
        assert attempt["text"]
    for attempt in group:
        correct = [answer["extracted"] == attempt["task"]["gold_answer"] for answer in attempt["answers"]]
        assert [answer["correct"] for answer in attempt["answers"]] == correct
        assert [answer["reward"] for answer in attempt["answers"]] == [float(bit) for bit in correct]
        paid = challenger_reward(kind, sum(correct) / len(correct)) if attempt["valid"] else config.invalid_reward
        assert attempt["reward"] == paid
    mean = math.fsum(attempt["reward"] for attempt in group) / len(group)
    for attempt in group:
        assert attempt["advantage"] == pytest.approx(attempt["reward"] - mean, abs=1e-12)
    [chosen] = [attempt for attempt in record["attempts"] if attempt["is_reasoner_task"]]
    mean = sum(answer["reward"] for answer in chosen["answers"]) / 8
    assert [answer["advantage"] for answer in chosen["answers"]] == pytest.approx(
        [answer["reward"] - mean for answer in chosen["answers"]]
    )


def test_trajectories_are_the_sampled_ids_of_both_groups(play):
    config = _few_shot()
    episode, _ = play(_script([_texts("vivi")]), config)
    trained = trajectories([episode, episode], config)
    assert [trajectory.role for trajectory in trained] == (["challenger"] * 4 + ["reasoner"] * 4) * 2
    for trajectory, attempt in zip(trained, episode.attempts):
        assert trajectory.prompt_ids == attempt.completion.prompt_ids
        assert trajectory.completion_ids == attempt.completion.completion_ids
        assert (trajectory.advantage, trajectory.reward) == (attempt.advantage, attempt.reward)
    assert (
        len({trajectory.prompt_ids for trajectory in trained[:4]})
        == len({trajectory.prompt_ids for trajectory in trained[4:8]})
        == 1
    )
    fixed = trajectories([episode], _few_shot(fixed_challenger=True))
    assert [trajectory.role for trajectory in fixed] == ["reasoner"] * 4


def test_metrics_of_a_known_episode(play):
    texts = _texts("vvi") + [" cut off..."]
    episode, _ = play(_script([texts], lambda question: 4 if "0" in question else 1), _few_shot())
    values = metrics([episode])
    expected = {
        "challenger/valid_share": 0.5,
        "challenger/invalid/truncated": 0.25,
        "challenger/invalid/unparsable": 0.25,
        "challenger/truncated_share": 0.25,
        "challenger/grounded_share": 1.0,
        "challenger/kind/String": 1.0,
        "challenger/advantage_nonzero_share": 1.0,
        "reasoner/pass_rate": 0.625,
        "reasoner/mixed_share": 0.5,
        "reasoner/passed/4_of_4": 0.5,
        "reasoner/passed/1_of_4": 0.5,
        "reasoner/passed/0_of_4": 0.0,
        "reasoner/length": 6.0,
        "reasoner/truncated_share": 0.0,
        "verifier/timeouts": 0.0,
        "game/trajectories": 8.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert all(isinstance(value, float) for value in values.values())
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert metrics([])["game/passages"] == 0.0


def test_span_grounding_and_references_make_invalid(play):
    texts = [
        " What is it?\nAnswer: Lagos",
        " What is it?\nAnswer: Accra",
        " What does the text say?\nAnswer: Accra",
        VALID.format(1),
    ]
    episode, _ = play(_script([texts]), _few_shot(grounding="span", reject_references=True))
    assert [attempt.invalid for attempt in episode.attempts] == [
        InvalidReason.UNGROUNDED,
        None,
        InvalidReason.REFERS_TO_PASSAGE,
        None,
    ]
    episode, _ = play(_script([texts]), _few_shot())
    assert [attempt.grounded for attempt in episode.attempts] == [False, True, True, True]


def test_no_corpus_shows_no_passage(play):
    episode, engine = play(_script([_texts("vvvv")]), _few_shot(no_corpus=True, grounding="span"))
    assert all("Ghana" not in prompt for prompt, _, _ in engine.calls)
    assert all(attempt.task is not None and attempt.grounded is None for attempt in episode.attempts)
    assert "challenger/grounded_share" not in metrics([episode])


def test_expressions_are_read_by_the_verifier(play):
    texts = [" What?\nAnswer: 2*x", " What?\nAnswer: x +", " What?\nAnswer: the area", " What?\nAnswer: \\frac{}"]
    script = _script([texts])
    episode, _ = play(
        lambda p, c: [" x+x", " 2x", " 2", " x^2"] if p.endswith("Answer:") else script(p, c),
        _few_shot(answer_types=["Expression"]),
    )
    assert [attempt.invalid for attempt in episode.attempts] == [None] + [InvalidReason.BAD_EXPRESSION] * 3
    assert [answer.verdict.correct for answer in episode.attempts[0].answers] == [True, True, False, False]


def _chat_script(selection, calls):
    free = json.dumps({"question": "Capital of Ghana?", "answer": "Accra", "answer_type": "String"})
    mcq = json.dumps(
        {
            "multiple_choice_question": "Capital?\nA) Accra\nB) Kumasi\nC) Tema\nD) Ho\nCorrect: A",
            "multiple_choice_correct": "A",
        }
    )

    def script(prompt, call):
        calls.append(prompt)
        if "boxed" in prompt:
            return (
                [r"It is \boxed{\text{A) Accra}}", r"\boxed{B}", "A", r"\boxed{A"]
                if "A)" in prompt
                else [r"\boxed{Accra}"] * 4
            )
        if "Do not write the question" in prompt:
            return [selection]
        return [mcq if "four options" in prompt else free] * 4

    return script


def test_chat_selects_then_asks_for_that_kind(play):
    calls = []
    selection = json.dumps({"suitable_for_mcq": True, "suitable_for_free_form": False, "best_answer_type": None})
    config = GameConfig(group_size=4, attempt_chunk=4)
    episode, engine = play(_chat_script(selection, calls), config)
    assert episode.answer_type == "MCQ" and len(calls) == 6
    assert engine.calls[0][1] == 1 and engine.calls[0][2].max_new_tokens == config.selection_max_tokens
    assert [answer.verdict.correct for answer in episode.attempts[0].answers] == [True, False, False, False]
    assert all("Correct" not in prompt and "BEGIN" not in prompt for prompt in calls[2:])
    # The selection is not trained on.
    assert len(trajectories([episode], config)) == 8


@pytest.mark.parametrize(
    ("selection", "settings"),
    [
        ("gibberish", {}),
        (
            json.dumps({"suitable_for_mcq": True, "suitable_for_free_form": False}),
            {"answer_types": ["String", "Integer"]},
        ),
    ],
)
def test_an_unreadable_or_unwanted_selection_is_drawn(play, selection, settings):
    kinds = {
        play(_chat_script(selection, []), GameConfig(group_size=4, attempt_chunk=4, attempts=4, **settings), slot=slot)[
            0
        ].answer_type
        for slot in range(40)
    }
    assert kinds == set(settings.get("answer_types", ["MCQ", "Integer", "Expression", "String"]))


def test_one_kind_or_random_needs_no_selection(play):
    for settings in ({"answer_types": ["String"]}, {"format_selection": "random"}):
        calls = []
        play(_chat_script("", calls), GameConfig(group_size=4, attempt_chunk=4, attempts=4, **settings))
        assert "Do not write the question" not in calls[0]


def test_a_failing_engine_ends_the_passage_and_leaves_no_task_running(loop, verifier):
    class Failing(Scripted):
        async def generate(self, prompt_ids, num_samples, sampling):
            if self.calls:
                self.calls.append(("", 0, sampling))
                if len(self.calls) == 2:
                    raise ConnectionError("engine down")
                await asyncio.sleep(60)
            return await super().generate(prompt_ids, num_samples, sampling)

    async def play_and_count():
        engine = Failing(lambda prompt, call: _texts("vvvv"))
        with pytest.raises(ConnectionError):
            await play_passage(
                GHANA, iteration=0, slot=0, engine=engine, tokenizer=CodePoints(), verifier=verifier,
                config=_few_shot(), temperature=1.0, top_p=1.0, seed=0,
            )  # fmt: skip
        return len(asyncio.all_tasks())

    assert loop.run_until_complete(play_and_count()) == 1


def test_tasks_of_a_passage_are_answered_together(loop, verifier):
    class Slow(Scripted):
        running = most = 0

        async def generate(self, prompt_ids, num_samples, sampling):
            Slow.running += 1
            Slow.most = max(Slow.most, Slow.running)
            await asyncio.sleep(0.01)
            Slow.running -= 1
            return await super().generate(prompt_ids, num_samples, sampling)

    engine = Slow(_script([_texts("vvvv")]))
    loop.run_until_complete(
        play_passage(
            GHANA,
            iteration=0,
            slot=0,
            engine=engine,
            tokenizer=CodePoints(),
            verifier=verifier,
            config=_few_shot(),
            temperature=1.0,
            top_p=1.0,
            seed=0,
        )  # fmt: skip
    )
    assert Slow.most == 4


def test_limits_and_stop_strings_by_role(play):
    _, engine = play(_script([_texts("vvvv")]), _few_shot(challenger_max_tokens=48, reasoner_max_tokens=12))
    assert (engine.calls[0][2].max_new_tokens, engine.calls[0][2].stop) == (48, ("\n\n",))
    assert (engine.calls[1][2].max_new_tokens, engine.calls[1][2].stop) == (12, ("\n",))
    assert "Ghana" not in engine.calls[1][0] and text_of(()) == ""


def test_switches_that_make_copies_giveaways_and_repeats_invalid(play):
    texts = [
        " What is the capital of it?\nAnswer: Accra",
        " Where do 33,846,114 people live there, its capital being what?\nAnswer: Accra",
        " Of Accra and Lagos, which is the capital?\nAnswer: Accra",
        " what is THE capital of it ?\nAnswer: Lagos",
    ]
    settings = {"reject_copies": 4, "reject_giveaways": True, "reject_duplicates": True}
    episode, _ = play(_script([texts]), _few_shot(**settings))
    assert [attempt.invalid for attempt in episode.attempts] == [
        None, InvalidReason.COPIED, InvalidReason.GIVES_AWAY, InvalidReason.DUPLICATE
    ]  # fmt: skip
    episode, _ = play(_script([texts]), _few_shot())
    assert all(attempt.invalid is None for attempt in episode.attempts), "off by default"


def test_another_challenger_is_asked_in_its_own_words_and_by_its_role(loop, verifier):
    class OtherCodePoints(CodePoints):
        def encode_prompt(self, prompt):
            return [number + 1 if number else 0 for number in super().encode_prompt(prompt)]

    engine = Scripted(_script([_texts("vvvv")]))  # two lines, where JSON is asked for
    other = Wording.of("chat", OtherCodePoints())
    episode = loop.run_until_complete(
        play_passage(
            GHANA, iteration=1, slot=0, engine=engine, tokenizer=CodePoints(), verifier=verifier,
            config=_few_shot(attempts=4), temperature=1.0, top_p=1.0, seed=0, challenger=other,
        )
    )  # fmt: skip
    assert (episode.prompt_style, episode.reasoner_prompt_style) == ("chat", "few_shot")
    record = episode_record(episode)
    assert (record["prompt_style"], record["reasoner_prompt_style"]) == ("chat", "few_shot")
    assert [attempt.invalid for attempt in episode.attempts] == [InvalidReason.UNPARSABLE] * 4
    prompt, _, sampling = engine.calls[0]
    assert "JSON" in "".join(chr(ord(letter) - 1) for letter in prompt) and sampling.role == "challenger"


def test_a_task_is_answered_again_with_its_passage_in_view_and_only_then(loop, verifier):
    engine = Scripted(_script([_texts("vvvv")], lambda question: 1 if "Passage" in question else 3))
    config = _few_shot()
    episode = loop.run_until_complete(
        play_passage(
            GHANA, iteration=1, slot=0, engine=engine, tokenizer=CodePoints(), verifier=verifier, config=config, temperature=1.0,
            top_p=1.0, seed=0,
        )
    )  # fmt: skip
    before = len(engine.calls)
    wording = Wording.of("few_shot", CodePoints())
    table = Table(engine, verifier, config, wording, wording, 1.0, 1.0, (0, 1, 0))
    audited = loop.run_until_complete(reanswered(table, episode, grounded=3, options_only=2))
    [(prompt, count, sampling)] = engine.calls[before:]
    assert GHANA.text in prompt and prompt.endswith("\nAnswer:") and (count, sampling.role) == (3, "reasoner")
    asked = [attempt for attempt in audited.attempts if attempt.grounded_answers]
    assert len(asked) == 1 and asked[0].is_reasoner_task and asked[0].options_only_answers == ()
    assert trajectories([audited], config) == trajectories([episode], config), "nobody is trained on an audit"
    record = episode_record(audited)
    assert sum("grounded_answers" in attempt for attempt in record["attempts"]) == 1
    assert GHANA.text not in engine.calls[before - 1][0]
    room = len(wording.tokenizer.encode_prompt(wording.style.grounded_prompt(asked[0].task, GHANA))) + config.reasoner_max_tokens
    calls = len(engine.calls)
    short = loop.run_until_complete(reanswered(table, episode, grounded=3, options_only=0, context=room - 1))
    assert short == episode and len(engine.calls) == calls, "what leaves no room for an answer is not asked"
    assert loop.run_until_complete(reanswered(table, episode, grounded=3, options_only=0, context=room)) == audited


def test_the_majoritys_share_pays_without_regard_to_the_gold_answer(play):
    for right in (1, 3):
        episode, _ = play(_script([_texts("vvvv")], lambda question: right), _few_shot(challenger_reward="r_zero_majority"))
        assert {attempt.reward for attempt in episode.attempts} == {0.5}, "three of four agree, on the gold answer or not"
    episode, _ = play(_script([_texts("iviv")]), _few_shot(challenger_reward="r_zero_majority"))
    assert [attempt.reward for attempt in episode.attempts] == [-0.1, 1.0, -0.1, 1.0]

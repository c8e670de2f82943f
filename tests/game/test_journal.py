"""A game that is put off at any moments, any number of times, ends as if it had never been."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from dice_engine import END, FIRST, PHRASES, DiceEngine, decode
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.carried import Game, game_from_state, game_state
from megatron_spice.game.episodes import episode_record, trajectories
from megatron_spice.game.journal import Recorder, joined
from megatron_spice.game.play import play_passage
from megatron_spice.game.records import Completion, Episode, Sampling
from megatron_spice.game.together import GamePutOff
from scripted_game import GHANA, CodePoints

CONFIG = GameConfig(
    prompt_style="few_shot", answer_types=["String"], group_size=3, attempt_chunk=3, attempts=9, challenger_max_tokens=7,
    reasoner_max_tokens=4,
)  # fmt: skip


@pytest.fixture
def play(loop, verifier):
    def play(game: Game, engine: DiceEngine) -> tuple[Episode | None, Game]:
        recorder = Recorder(engine, game.said, decode, lambda: engine.is_over)
        coroutine = play_passage(
            game.passage, iteration=game.begun, slot=game.slot, engine=recorder, tokenizer=CodePoints(), verifier=verifier,
            config=CONFIG, temperature=1.0, top_p=1.0, seed=0,
        )  # fmt: skip
        try:
            return loop.run_until_complete(coroutine), replace(game, said=recorder.said)
        except GamePutOff:
            return None, replace(game, said=recorder.said)

    return play


def completions(episode: Episode) -> list[Completion]:
    return [
        completion
        for attempt in episode.attempts
        for completion in (attempt.completion, *(answer.completion for answer in attempt.answers))
    ]


def without_versions(episode: Episode) -> dict:
    record = episode_record(episode)
    for each in (one for attempt in record["attempts"] for one in (attempt, *attempt["answers"])):
        del each["weights"]
    return {**record, "seconds": 0}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slot=st.integers(0, 30), moments=st.lists(st.integers(0, 40), max_size=6))
@example(slot=0, moments=[0, 0, 1, 1, 1])
def test_a_game_put_off_at_any_moments_ends_as_if_it_had_not_been(play, slot: int, moments: list[int]) -> None:
    through, _ = play(Game(1, slot, GHANA), DiceEngine())
    game, episode = Game(1, slot, GHANA), None
    for turn, steps in enumerate([*moments, None], start=1):
        episode, game = play(game, DiceEngine(str(turn), steps))
        if episode is not None:
            break
        for entry in game.said:
            for part in entry.completions:
                assert len(part.completion_ids) == len(part.logprobs)
                assert part.finish != "abort" or END not in part.completion_ids
        game = game_from_state(json.loads(json.dumps(game_state(game))), lambda index: GHANA if index == 7 else None)
    assert without_versions(episode) == without_versions(through)
    for found, expected in zip(completions(episode), completions(through), strict=True):
        assert (found.prompt_ids, found.completion_ids) == (expected.prompt_ids, expected.completion_ids)
        assert (found.logprobs, found.finish, found.text) == (expected.logprobs, expected.finish, expected.text)
        versions = [int(version) for version in found.weight_versions.split("+")]
        assert versions == sorted(set(versions))
        assert found.num_stale(found.weight_version) == sum(count for _, count in found.earlier) < len(found.completion_ids)
        assert found.num_stale("99") == len(found.completion_ids)
    # Once more from its journal alone: nothing is asked, and it is the same.
    silent = DiceEngine(steps_left=0)
    again, _ = play(game, silent)
    assert without_versions(again) == without_versions(through) and silent.num_requests == 0


def test_the_games_of_these_tests_have_tasks_answers_and_all_ways_to_end(play) -> None:
    episodes = [play(Game(1, slot, GHANA), DiceEngine())[0] for slot in range(20)]
    finishes = Counter(completion.finish for episode in episodes for completion in completions(episode))
    assert min(finishes["stop"], finishes["length"]) > 10
    assert sum(bool(attempt.answers) for episode in episodes for attempt in episode.attempts) > 10


def test_a_completion_cut_short_once_keeps_both_versions_and_is_trained_as_stale(play) -> None:
    _, game = play(Game(1, 0, GHANA), DiceEngine("3", 6))
    episode, _ = play(game, DiceEngine("4"))
    record = json.loads(json.dumps(episode_record(replace(episode, iteration=5, begun=4))))
    assert (record["iteration"], record["begun"]) == (5, 4)
    assert {attempt["weights"] for attempt in record["attempts"]} >= {"3+4"}
    trained = trajectories([episode], CONFIG, version="4")
    runs = [trajectory.num_stale for trajectory in trained]
    assert max(runs) > 0 and any(0 < run < len(each.completion_ids) for run, each in zip(runs, trained))
    assert {each.num_stale for each in trajectories([episode], CONFIG)} == {0}


def part(*phrases: int, version: str = "3", **more: object) -> Completion:
    ids = tuple(FIRST + phrase for phrase in phrases)
    return Completion((40, 41), ids, tuple(-float(phrase) for phrase in phrases), "abort", "", version, **more)


def test_a_stop_string_across_the_border_ends_the_completion_there() -> None:
    more = replace(part(4, 2, 3, version="4"), finish="length", text="\n Accra Lagos")
    whole = joined(part(2, 4), more, ("\n\n",), decode)
    assert (whole.completion_ids, whole.logprobs) == (part(2, 4, 4).completion_ids, (-2.0, -4.0, -4.0))
    assert (whole.finish, whole.text, whole.weight_versions) == ("stop", " Accra", "3+4")
    aborted = joined(part(2, 4), part(4, 2), ("\n\n",), decode)
    assert (aborted.finish, aborted.text, aborted.earlier) == ("stop", " Accra", ())


def test_a_continuation_that_has_nothing_to_add_changes_nothing() -> None:
    cut = part(2, 3, version="4", earlier=(("3", 1),))
    assert joined(cut, part(version="5"), (), decode) == replace(cut, text=" Accra Lagos")
    ended = joined(cut, replace(part(version="5"), finish="length"), (), decode)
    assert (ended.finish, ended.text, ended.weight_versions) == ("length", " Accra Lagos", "3+4")
    assert joined(part(), replace(part(3, version="5"), prompt_ids=(9,)), (), decode).prompt_ids == (40, 41)
    twice = joined(cut, part(0, 1, version="5"), (), decode)
    assert (twice.earlier, twice.weight_version) == ((("3", 1), ("4", 1)), "5")


def test_a_journal_answers_only_what_was_asked(loop) -> None:
    sampling = Sampling(1.0, 5, seed=1)
    first = Recorder(DiceEngine(), (), decode)
    loop.run_until_complete(first.generate([40], 2, sampling))
    again = Recorder(engine := DiceEngine(), first.said, decode)
    loop.run_until_complete(again.generate([40], 2, sampling))
    assert engine.num_requests == 0 and again.said == first.said
    for request in (([41], 2, sampling), ([40], 2, replace(sampling, seed=2)), ([40], 2, sampling)):
        loop.run_until_complete(again.generate(*request))
    assert engine.num_requests == 3 and len(again.said) == 4  # another prompt, another seed, and the same a second time


def test_one_more_sample_than_before_is_asked_for_alone(loop) -> None:
    sampling = Sampling(1.0, 5, seed=1)
    first = Recorder(DiceEngine(), (), decode)
    loop.run_until_complete(first.generate([40], 2, sampling))
    again = Recorder(engine := DiceEngine(), first.said, decode)
    found = loop.run_until_complete(again.generate([40], 3, sampling))
    assert engine.num_requests == 1
    assert found == loop.run_until_complete(DiceEngine().generate([40], 3, sampling))
    assert len(PHRASES) + FIRST - 1 == END


def test_records_come_back_from_a_pickle_as_they_were():
    import pickle

    from megatron_spice.game.records import Answer, Attempt, Completion, InvalidReason, Task, Verdict

    completion = Completion((1, 2), (3,), (-0.5,), "stop", "text", "3", (("2", 1),))
    answer = Answer(completion, Verdict(True, "4", "exact"), 1.0, 0.5)
    attempt = Attempt(completion, Task("What?", "4", "Integer"), None, True, True, (answer,), 1.0, -0.5, True)
    invalid = Attempt(completion, None, InvalidReason.UNPARSABLE)
    assert pickle.loads(pickle.dumps((attempt, invalid))) == (attempt, invalid)

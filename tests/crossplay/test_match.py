"""A match without engines: names, intervals, the table, and what an interrupted one still has to play."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_game import GHANA, CodePoints, Scripted
from standing_server import Standing, standing
from tiny_recipe import tool
from tiny_tokenizer import write_tokenizer

from megatron_spice.config.loader import load_config
from megatron_spice.crossplay.match import Match
from megatron_spice.crossplay.matrix import draw, interval, matrix, table
from megatron_spice.crossplay.players import Player, check, players
from megatron_spice.game.play import Table, Wording
from megatron_spice.game.verify import Verifier
from megatron_spice.rollout.engine import EngineError, EngineRefused

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml"


class Engine(Scripted):
    """One that a session can use."""

    def check(self) -> None:
        pass

    async def close_requests(self) -> None:
        pass


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
@settings(max_examples=20)
def test_an_interval_holds_the_mean_and_lies_within_the_values(values):
    low, high = interval(values)
    assert min(values) - 1e-9 <= low <= fmean(values) + 1e-9 and fmean(values) - 1e-9 <= high <= max(values) + 1e-9
    assert interval(values) == (low, high), "it is reproducible"
    if len(set(values)) == 1:
        assert low == pytest.approx(high)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = random.Random(0)
    samples = [[float(rng.random() < 0.4) for _ in range(60)] for _ in range(100)]
    held = sum(low <= 0.4 <= high for low, high in map(interval, samples))
    assert 88 <= held <= 99


def test_models_are_named_or_named_after_their_folders():
    found = players("early=runs/a/iteration_8, runs/b/iteration_50,http://gpu7:30000")
    assert found == [
        Player("early", "runs/a/iteration_8"), Player("b-iteration_50", "runs/b/iteration_50"), Player("gpu7_30000", "http://gpu7:30000")
    ]  # fmt: skip
    assert [player.is_url for player in found] == [False, False, True]
    with pytest.raises(ValueError, match="two models are called x"):
        players("x=a,x=b")
    with pytest.raises(ValueError, match="names no model"):
        players(" , ")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="late: .*nowhere is not there"):
        check(Player("late", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="holds no model"):
        check(Player("late", str(tmp_path)))
    check(Player("server", "http://gpu7:30000"))


def _lines(path: Path, lines: list[dict], torn: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def test_an_interrupted_match_has_the_rest_to_play_and_its_numbers_are_those_of_its_lines(tmp_path):
    early, late = Player("early", "a"), Player("late", "b")
    match = Match(load_config(QUICKSTART), tmp_path, 3, 0, "cpu")
    task = {"question": "Which?", "gold_answer": "x", "answer_type": "String"}
    wrote = [{"slot": slot, "attempts": 8, "valid": slot, "task": task if slot else None} for slot in (2, 0, 1)]
    _lines(tmp_path / "tasks-early.jsonl", wrote)
    _lines(tmp_path / "tasks-late.jsonl", wrote[:1], torn='{"slot": 1, "att')
    assert match._missing_tasks(early) == [] and match._missing_tasks(late) == [0, 1]
    assert (tmp_path / "tasks-late.jsonl").read_text().endswith("}\n"), "half a line is taken away"
    _lines(tmp_path / "answers-late.jsonl", [{"challenger": "early", "slot": 1, "correct": [True, True, False, False]}])
    missing = match._missing_answers(late, [early, late])
    assert [(line["challenger"], line["slot"]) for line in missing] == [("early", 2), ("late", 2)]

    found = matrix(match, [early, late], [late])
    assert found["challengers"]["early"] == {"passages": 3, "with_task": 2, "refused": 0, "valid_share": 3 / 24}
    assert [(pair["tasks"], pair["pass_rate"]) for pair in found["pairs"]] == [(1, 0.5), (0, None)]
    assert "0.500 [no interval] n=1" in table(found) and "no task" in table(found)
    assert "bootstrap over tasks" in found["interval"] and "bootstrap over tasks" in table(found)
    draw(found, tmp_path / "matrix.png")


def test_what_an_engine_refuses_is_noted_and_counts_in_no_rate(tmp_path):
    config = load_config(QUICKSTART)
    match, player = Match(config, tmp_path, 2, 0, "cpu"), Player("one", "http://gpu7:30000")

    def refuse(status: int) -> Callable[[str, int], list[str]]:
        def script(prompt: str, call: int) -> list[str]:
            raise EngineRefused(f"was answered with {status}", status)

        return script

    async def played(status: int) -> None:
        wording = Wording.of("few_shot", CodePoints())
        async with Verifier(config.game.verifier) as verifier:
            for slot in range(2):
                table = Table(Scripted(refuse(status)), verifier, config.game, wording, wording, 1.0, 1.0, (0, 0, slot))
                await match._write(player, table, GHANA)
                task = {"question": "Which?", "gold_answer": "x", "answer_type": "String"}
                await match._answer(player, table, {"challenger": "one", "slot": slot, "task": task})

    with pytest.raises(EngineRefused, match="401"):
        asyncio.run(played(401))
    assert match.tasks(player) == []
    asyncio.run(played(400))
    assert match._missing_tasks(player) == [] and [line["refused"] for line in match.tasks(player)] == ["was answered with 400"] * 2
    found = matrix(match, [player], [player])
    assert found["challengers"]["one"] == {"passages": 2, "with_task": 0, "refused": 2, "valid_share": 0.0}
    assert [(pair["tasks"], pair["refused"], pair["pass_rate"]) for pair in found["pairs"]] == [(0, 2, None)]


def test_other_rules_are_another_match(tmp_path):
    Match(load_config(QUICKSTART), tmp_path, 3, 0, "cpu")
    Match(load_config(QUICKSTART), tmp_path, 3, 0, "cpu")
    with pytest.raises(ValueError, match="other rules"):
        Match(load_config(QUICKSTART), tmp_path, 4, 0, "cpu")


@pytest.fixture
def server(tmp_path) -> Standing:
    with standing() as made:
        made.tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
        yield made


def test_a_name_that_stood_for_another_model_is_refused_before_anything_is_played(tmp_path, server):
    match = Match(load_config(QUICKSTART), tmp_path / "match", 1, 0, "cpu")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("same")
    early, server_player = Player("early", str(tmp_path / "a")), Player("server", server.url)
    task = {"question": "Which?", "gold_answer": "x", "answer_type": "String"}
    for name in ("early", "server"):
        _lines(tmp_path / "match" / f"tasks-{name}.jsonl", [{"slot": 0, "attempts": 8, "valid": 1, "task": task}])
        answers = [{"challenger": each, "slot": 0, "correct": [True]} for each in ("early", "server")]
        _lines(tmp_path / "match" / f"answers-{name}.jsonl", answers)
    said: list[str] = []
    match.play([early, server_player], [server_player, early], said.append)
    match.play([early], [early], said.append)
    assert not said, "all is played already"
    for other in (Player("early", str(tmp_path / "b")), Player("server", f"{server.url}/")):
        with pytest.raises(ValueError, match=f"has played under this name.*{other.name}-2={other.source}"):
            match.play([early], [other], said.append)
    server.weights = "7"
    match.play([early], [server_player], said.append)
    assert len(said) == 1 and "server is not asked again" in said[0] and "weights default" in said[0], "its part has been played"
    answers = tmp_path / "match" / "answers-server.jsonl"
    whole = answers.read_text()
    answers.write_text("")
    with pytest.raises(ValueError, match="weights 7.*but .*weights default.* has played under this name"):
        match.play([early], [server_player], said.append)
    answers.write_text(whole)
    (tmp_path / "a" / "weights").write_text("changed")
    with pytest.raises(ValueError, match="early is .*another folder"):
        match.play([early], [server_player], said.append)


def test_a_server_that_has_nothing_left_to_do_need_not_be_there(tmp_path):
    match = Match(load_config(QUICKSTART), tmp_path / "match", 1, 0, "cpu")
    with standing() as one:
        player = Player("server", one.url, str(write_tokenizer(tmp_path / "tokenizer")))
        task = {"question": "Which?", "gold_answer": "x", "answer_type": "String"}
        _lines(tmp_path / "match" / "tasks-server.jsonl", [{"slot": 0, "attempts": 8, "valid": 1, "task": task}])
        _lines(tmp_path / "match" / "answers-server.jsonl", [{"challenger": "server", "slot": 0, "correct": [True]}])
        match.play([player], [player], print)
    match.play([player], [player], print)
    (tmp_path / "match" / "answers-server.jsonl").unlink()
    with pytest.raises(EngineError, match="server_info"):
        match.play([player], [player], print)


def test_passages_are_read_with_the_corpuss_tokenizer_and_told_as_text_to_players_of_other_families(tmp_path, monkeypatch):
    """The player here has a tokenizer of code points, the corpus one of bytes."""
    model = write_tokenizer(tmp_path / "model")
    (model / "config.json").write_text("{}")
    texts = [f"Ghana exports gold and cocoa, {number} tons of it." for number in range(4)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool("preprocess_corpus", tmp_path / "texts.jsonl", "--tokenizer", model, "--output", tmp_path / "corpus", "--min-tokens", 1)
    config = load_config(QUICKSTART, [f"policy.model={model}", f"corpus.path={tmp_path / 'corpus'}", "game.answer_types=[Integer]"])
    engine = Engine(lambda prompt, call: [" How many?\nAnswer: 8"] * 8)

    @contextmanager
    def serve(*_):
        yield engine, CodePoints()

    monkeypatch.setattr("megatron_spice.crossplay.match.served", serve)
    (tmp_path / "other").mkdir()
    player, match = Player("other", str(tmp_path / "other")), Match(config, tmp_path / "match", 3, 0, "cpu")
    match.play([player], [], print)
    assert len(match.tasks(player)) == 3
    assert all(any(text in prompt for text in texts) for prompt, _, _ in engine.calls)

"""An evaluation that goes on: with more questions, with a judge, past questions that do not fit, and never with another model."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest
from openai_server import Server, play

from tiny_tokenizer import write_tokenizer

from megatron_spice.config.schema import RolloutConfig
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.evaluation import command, endpoint
from megatron_spice.evaluation.command import Plan, evaluate, name_of
from megatron_spice.evaluation.context import context_of
from megatron_spice.evaluation.endpoint import EndpointError, TooLong, is_too_long
from megatron_spice.evaluation.model import EngineModel
from megatron_spice.evaluation.table import table
from megatron_spice.game.records import Completion, Sampling, Task
from megatron_spice.rollout.engine import EngineRefused
from megatron_spice.rollout.http_verbs import HttpVerbs

ROWS = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
ANSWERS = {"0 + 1?": r"\boxed{1}", "1 + 1?": r"\boxed{two, 2}", "2 + 1?": r"\boxed{4}", "3 + 1?": "I do not know"}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Makes the plan of a command for a server's address."""
    monkeypatch.setenv(command.KEY_VARIABLE, "secret")
    monkeypatch.setenv(command.JUDGE_KEY_VARIABLE, "secret")
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)

    def made(url: str, *more: str, rows: list[dict] = ROWS) -> Plan:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parser = argparse.ArgumentParser()
        command.add_options(parser)
        return Plan(parser.parse_args([url, "--tasks", "gsm8k", "--data", f"gsm8k={file}", "--output", str(tmp_path / "out"), *more]))

    return made


def marks(tmp_path: Path) -> list[str]:
    return [json.loads(line).get("id") for line in (tmp_path / "out" / "gsm8k.jsonl").read_text().splitlines()[1:]]


def test_a_raised_limit_and_a_judge_go_on_from_the_stored_answers(plan, tmp_path, capsys):
    server = Server(ANSWERS)

    async def body(url: str) -> None:
        [two] = await evaluate(plan(url, "--limit", "2"))
        assert two.score.items == 2 and server.asked == ["0 + 1?", "1 + 1?"]
        [four] = await evaluate(plan(url))
        assert four.score.mean == 0.25 and server.asked[2:] == ["2 + 1?", "3 + 1?"]
        [judged] = await evaluate(plan(url, "--judge", url))
        assert len(server.asked) == 4, "the model is not asked again"
        assert (judged.score.mean, judged.rules_only.mean) == (0.5, 0.25) and sorted(server.judged) == ["4", "two, 2"]
        [again] = await evaluate(plan(url, "--judge", url))
        assert again.score == judged.score and len(server.judged) == 2, "what was judged is not judged again"
        [without] = await evaluate(plan(url))
        assert without.score == four.score, "a judge that is not asked for does not count"
        await evaluate(plan(url, "--judge", url, "--judge-model", "other"))
        assert len(server.judged) == 4, "another judge has an opinion of its own"

    play(server, body)
    assert marks(tmp_path) == ["1", "2", "3", "4", "2", "3", "2", "3"], "the last line of a question counts"
    assert "gsm8k: all answers, to 4 questions, are from" in capsys.readouterr().err


def test_another_question_or_gold_answer_is_refused(plan):
    async def body(url: str) -> None:
        await evaluate(plan(url))
        with pytest.raises(ValueError, match=r"has another question '2' \(gold was '2', is '3'\): give another --output"):
            await evaluate(plan(url, rows=[ROWS[0], {**ROWS[1], "answer": "#### 3"}]))

    play(Server(ANSWERS), body)


def test_the_scores_of_one_model_are_not_printed_as_anothers(plan, tmp_path, capsys):
    server = Server(ANSWERS)

    async def body(url: str) -> str:
        await evaluate(plan(url, "--served-name", "A"))
        with pytest.raises(ValueError, match="served_name was 'A', is 'B'"):
            await evaluate(plan(url, "--served-name", "B"))
        await evaluate(plan(url, "--output", str(tmp_path / "first")))
        server.serves = "another"
        with pytest.raises(ValueError, match="serves was {'id': 'small'}, is {'id': 'another'}"):
            await evaluate(plan(url, "--output", str(tmp_path / "first")))
        return url

    url = play(server, body)
    asked = len(server.asked)
    # The server is gone: what its log has can still be summed up, and that is said. What it does not have is an error.
    [result] = asyncio.run(evaluate(plan(url, "--served-name", "A")))
    assert result.score.mean == 0.25 and len(server.asked) == asked
    assert "whether it still serves what the logs are of cannot be told" in capsys.readouterr().err
    with pytest.raises(EndpointError, match="/v1/models failed"):
        asyncio.run(evaluate(plan(url, "--served-name", "A", rows=[*ROWS, {"question": "9?", "answer": "#### 9"}])))
    with pytest.raises(EndpointError, match="/v1/models failed"):
        asyncio.run(evaluate(plan(url, "--output", str(tmp_path / "none"))))
    assert not (tmp_path / "none").exists()


def test_a_question_that_does_not_fit_is_wrong_and_the_others_are_asked(plan, tmp_path):
    long = {"question": "3 + 1? " + "It is long. " * 500, "answer": "#### 4"}
    server = Server({**ANSWERS, long["question"].strip(): r"\boxed{4}"}, context=2000)

    async def body(url: str) -> str:
        [found] = await evaluate(plan(url, rows=[long, *ROWS[:3]]))
        assert (found.score.mean, found.score.items, found.too_long) == (0.25, 4, 1) and found.reasons["question_too_long"] == 1
        assert "1 too long for the context, counted as wrong" in table([found])
        assert len(server.asked) == 3, "the longest answer, 4096 tokens, is made shorter where the question fits"
        [again] = await evaluate(plan(url, rows=[long, *ROWS[:3]]))
        assert again.score == found.score and len(server.asked) == 3
        return url

    play(server, body)
    [told] = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert told["too_long"] == 1


def test_a_larger_context_answers_what_did_not_fit_the_smaller_one(plan, tmp_path, capsys):
    long = {"question": "3 + 1? " + "It is long. " * 500, "answer": "#### 4"}
    server = Server({**ANSWERS, long["question"].strip(): r"\boxed{4}"}, context=2000)
    server.endless.add("2 + 1?")
    rows = [long, *ROWS[:3]]

    async def body(url: str) -> None:
        [small] = await evaluate(plan(url, rows=rows))
        assert small.too_long == 1 and server.asked == ["0 + 1?", "1 + 1?", "2 + 1?"]
        server.context = 1999
        await evaluate(plan(url, rows=rows))
        assert len(server.asked) == 3, "a smaller one decides nothing"
        server.context = 20000
        [large] = await evaluate(plan(url, rows=rows))
        assert large.too_long == 0 and sorted(server.asked[3:]) == ["2 + 1?", long["question"].strip()] and large.cut == 0.25
        assert "gsm8k: 2 questions are asked again: they or their answers did not fit, and the context has 20000" in capsys.readouterr().err
        server.context = 40000
        [same] = await evaluate(plan(url, rows=rows))
        assert same.score == large.score and len(server.asked) == 5, "it was cut at --max-tokens"

    play(server, body)


def test_sampled_answers_of_two_contexts_are_not_mixed(plan):
    server = Server(ANSWERS, context=2000)
    server.endless.add("2 + 1?")
    sampled = ("--samples", "2", "--temperature", "1")

    async def body(url: str) -> None:
        await evaluate(plan(url, *sampled))
        server.context = 20000
        with pytest.raises(ValueError, match="answers to 1 questions were cut .* at 2000 tokens, and it has 20000 now; .* --output"):
            await evaluate(plan(url, *sampled))

    play(server, body)


def test_an_engines_answer_that_ended_where_its_context_did_is_marked(tmp_path):
    class Endless:
        async def generate(self, ids: list[int], samples: int, sampling: Sampling) -> list[Completion]:
            count = sampling.max_new_tokens
            return [Completion(tuple(ids), (1,) * count, (0.0,) * count, "length", "", "0")] * samples

    tokenizer, task = TextTokenizer.from_dir(write_tokenizer(tmp_path)), Task("1 + 1?", "2", "Integer")
    room = [EngineModel(Endless(), tokenizer, "few_shot", context) for context in (700, 7000)]
    small, large = (asyncio.run(model.answer(task, 2, 0.0, 600)) for model in room)
    assert [each.lacked_room for each in (*small, *large)] == [True, True, False, False]
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    engines = [RolloutConfig(max_total_tokens=4096), RolloutConfig(context_length=100)]
    found = [context_of(tmp_path, engine, on_cpu) for engine in engines for on_cpu in (True, False)]
    assert found == [4096, 8192, 100, 100] and context_of(tmp_path / "none", RolloutConfig(), True) is None


def test_an_engine_says_so_too(tmp_path):
    """Before it is asked, where its context is known; by its refusal, where not. Whatever else it refuses ends the evaluation,
    whatever its log says."""

    class Refuses:
        def __init__(self, said: str) -> None:
            self.said = said
            log = "its log: context length 8, max_total_num_tokens 9, too long"
            self.http = HttpVerbs("http://engine", "", timeout=1.0, diagnose=lambda: log)

        async def generate(self, ids: list[int], samples: int, sampling: Sampling) -> list[Completion]:
            return self.http.accept("POST", "/generate", 400, json.dumps({"error": {"message": self.said}}))

    tokenizer, task = TextTokenizer.from_dir(write_tokenizer(tmp_path)), Task("1 + 1?", "2", "Integer")
    refuses = Refuses("The input (9 tokens) is longer than the model's context length (8 tokens).")
    for context in (16, None):
        with pytest.raises(TooLong, match="context"):
            asyncio.run(EngineModel(refuses, tokenizer, "few_shot", context).answer(task, 1, 0.0, 8))
    with pytest.raises(EngineRefused, match="no such parameter"):
        asyncio.run(EngineModel(Refuses("no such parameter"), tokenizer, "few_shot", None).answer(task, 1, 0.0, 8))


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (400, "The input (9000 tokens) is longer than the model's context length (8192 tokens).", True),
        (400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", True),
        (400, '{"error": {"code": "context_length_exceeded"}}', True),
        (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", True),
        (400, "the request exceeds the available context size", True),
        (413, "Payload too large", True),
        (400, "Input length (9000 tokens) exceeds the maximum allowed length (8186 tokens). Use a shorter input", True),
        (400, "The decoder prompt (length 9000) is longer than the maximum model length of 8192.", True),
        (400, "prompt is too long: 9000 tokens > 8000 maximum", True),
        (400, "Please reduce the length of the messages or completion.", True),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1600 `inputs` tokens and 1000 `max_new_tokens`", True),
        (400, "logprob_start_len (7) must be lower than the number of input tokens (5)", False),
        (400, "stop: tokens 7 and 8 are not in the vocabulary", False),
        (400, "top_logprobs is too large", False),
        (400, "the image has no context", False),
        (400, "Unsupported parameter: 'max_tokens' is not supported with this model.", False),
        (404, "The model `context` does not exist.", False),
        (400, "temperature must be at most 2", False),
    ],
)  # fmt: skip
def test_which_refusals_are_about_the_length(status, said, expected):
    assert is_too_long(status, said) is expected


def test_a_log_of_the_format_before_is_gone_on_with(plan, tmp_path, monkeypatch):
    """Logs of checkpoints; those of servers did not say which model was behind them, and are refused."""
    monkeypatch.setattr(command.models, "check", lambda *_: None)
    (tmp_path / "model").mkdir()
    local = plan(str(tmp_path / "model"), rows=ROWS[:2])
    old = {key: value for key, value in local.header(local.tasks[0][0], None).items() if key != "format"}
    answer = {"response": "", "extracted": None, "correct": True, "reason": "exact", "finish": "stop", "tokens": 1}
    lines = [{**old, "judge": None, "questions": "0123456789abcdef"}]
    lines += [{**item.as_json(), "answers": [answer]} for _, items in local.tasks for item in items]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gsm8k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [found] = asyncio.run(evaluate(local))
    assert found.score.mean == 1.0 and found.score.items == 2

    async def body(url: str) -> None:
        (tmp_path / "out" / "gsm8k.jsonl").write_text(json.dumps({**lines[0], "model": url}) + "\n")
        with pytest.raises(ValueError, match="was begun otherwise .*served_name was not said, is ''"):
            await evaluate(plan(url))

    play(Server(ANSWERS), body)


def test_a_servers_folder_is_named_after_what_was_asked_for():
    names = [name_of("http://gpu7:30000/v1", served, ids) for served in ("", "org/A", "org/B") for ids in (False, True)]
    assert names[0] == "gpu7-30000" and names[2] == "gpu7-30000-org-A" and len(set(names)) == 6

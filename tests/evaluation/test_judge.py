"""The judge and the endpoint it is asked through, against a small server of OpenAI's interface on the loopback."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable

import pytest
from openai_server import Server, play

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.evaluation import log as log_file
from megatron_spice.evaluation.endpoint import Endpoint, EndpointError
from megatron_spice.evaluation.items import Item
from megatron_spice.evaluation.judge import Judge
from megatron_spice.evaluation.log import TaskLog
from megatron_spice.evaluation.model import EndpointModel
from megatron_spice.evaluation.run import Evaluator
from megatron_spice.evaluation.tasks import BY_NAME
from megatron_spice.game.prompts_chat import SYSTEM
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier


def test_the_judge_is_asked_only_where_rules_say_different(tmp_path):
    tasks = {
        "right": ("7", r"\boxed{7}"), "judged right": ("x+7", r"\boxed{x plus 7}"), "judged wrong": ("x+7", r"\boxed{x plus 8}"),
        "silent": ("x+7", "I do not know"), "long": ("x+7", r"\boxed{" + "y" * 5000 + "7}"),
    }  # fmt: skip
    server = Server({question: answer for question, (_, answer) in tasks.items()}, fail_first=1)
    items = [Item(q, Task(q, gold, "Integer" if gold == "7" else "Expression")) for q, (gold, _) in tasks.items()]

    async def body(url: str):
        async with Verifier(VerifierConfig(timeout=30.0)) as verifier, Endpoint(url, "secret") as endpoint:
            judge = Judge(endpoint)
            evaluator = Evaluator(EndpointModel(endpoint, "chat"), verifier, judge)
            log = TaskLog(tmp_path / "log.jsonl", {"task": "math500"})
            found = await evaluator.run(BY_NAME["math500"], items, log)
            # General knowledge is matched exactly; no judge is asked.
            other = await evaluator.run(BY_NAME["bbeh"], items[2:3], TaskLog(tmp_path / "other.jsonl", {}))
            return found, other

    found, other = play(server, body)
    assert found.score.mean == 0.4 and found.rules_only.mean == 0.2
    assert sorted(server.judged) == ["x plus 7", "x plus 8"] and server.systems == {SYSTEM}
    assert found.reasons == {"exact": 1, "judge": 1, "different": 1, "no_answer": 1, "too_long": 1}
    assert found.unanswered == 0.2 and found.mean_tokens == 5 and other.score.mean == 0.0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert {r["id"]: r["answers"][0].get("judge") for r in records} == {
        "right": None, "judged right": True, "judged wrong": False, "silent": None, "long": None,
    }  # fmt: skip


def test_errors_of_an_endpoint_are_said():
    async def wrong_key(url: str):
        async with Endpoint(url, "other"):
            pass

    with pytest.raises(EndpointError, match=r"GET http://127.0.0.1:\d+/v1/models was answered with 401: no"):
        play(Server({}), wrong_key)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("yes", True), ("Yes.", True), ("**No**", False), ("NO, since 2 is not 3", False), ("They are the same: yes", True),
        ("<think>no, no</think>\nyes", True), ("", None), ("It depends.", None), ("nothing", None),
    ],
)  # fmt: skip
def test_what_a_judge_says(said, verdict):
    class Says:
        async def chat(self, messages, samples, **settings):  # noqa: ANN001, ANN003, ANN202
            return [{"text": said}]

    assert asyncio.run(Judge(Says()).same("?", "1", "2")) is verdict


def test_two_evaluations_do_not_share_a_log(tmp_path):
    log = TaskLog(tmp_path / "log.jsonl", {"task": "x"})
    with pytest.raises(ValueError, match="being written by another evaluation"):
        TaskLog(tmp_path / "log.jsonl", {"task": "x"})
    log.close()
    TaskLog(tmp_path / "log.jsonl", {"task": "x"}).close()
    with pytest.raises(ValueError, match="task was 'x', is 'y'"):
        TaskLog(tmp_path / "log.jsonl", {"task": "y"})


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_taken_for_another_evaluation(tmp_path, monkeypatch, number):
    monkeypatch.setattr(log_file.fcntl, "flock", _failing(number))
    log = TaskLog(tmp_path / "log.jsonl", {"task": "x"})
    log.add({"id": "1", "answers": []})
    log.close()
    assert list(TaskLog(tmp_path / "log.jsonl", {"task": "x"}).done) == ["1"]


def test_what_else_a_file_system_says_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file.fcntl, "flock", _failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        TaskLog(tmp_path / "log.jsonl", {"task": "x"})


def _failing(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_line_that_was_cut_short_is_dropped_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TaskLog(path, {"task": "x"})
    log.add({"id": "1", "answers": []})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "2", "ans')
    log = TaskLog(path, {"task": "x"})
    assert list(log.done) == ["1"]
    log.add({"id": "2", "answers": []})
    log.close()
    assert path.read_bytes() == whole + b'{"id": "2", "answers": []}\n'
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(ValueError, match="log.jsonl:3 is not a line of such a log"):
        TaskLog(path, {"task": "x"})

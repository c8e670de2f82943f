"""A reader's answers to a run's tasks, with a scripted engine and the real verifier: what is asked, of which tasks, and only once."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from curriculum_log import write_run
from scripted_game import CodePoints, Scripted
from standing_server import Standing, standing
from tiny_tokenizer import write_tokenizer

from megatron_spice.crossplay import agreement
from megatron_spice.rollout.engine import EngineRefused
from tools import audit

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml"


class Reader(Scripted):
    """Gives the gold answer where the passage's number is even."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, call: [" 8" if int(prompt.rsplit("Passage number ", 1)[1][0]) % 2 == 0 else " 9"] * 3)

    def check(self) -> None:
        pass

    async def close_requests(self) -> None:
        pass


@pytest.fixture
def reader(monkeypatch) -> Reader:
    engine = Reader()

    @contextmanager
    def served(*_):
        yield engine, CodePoints()

    monkeypatch.setattr(agreement, "served", served)
    return engine


@pytest.fixture
def gpu7(tmp_path) -> Standing:
    """Who the reader is; what it answers comes from the script."""
    with standing() as made:
        made.tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
        yield made


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "run", "?\nAnswer: 8", "How many?", "8", 8)
    (folder / "recipe.yaml").write_text(RECIPE.read_text() + "\nwarmup: {}\n")
    text = (folder / "recipe.yaml").read_text().replace("game:\n", "game:\n  no_corpus: false\n")
    (folder / "recipe.yaml").write_text(text)
    return folder


def test_tasks_are_drawn_evenly_read_with_their_passages_and_not_asked_twice(run, reader, gpu7, capsys):
    command = [str(run), "--reader", f"strong={gpu7.url}", "--tasks", "4", "--answers", "3"]
    assert audit.main(command) == 0
    prompts = [prompt for prompt, _, _ in reader.calls]
    assert sorted(int(prompt.rsplit("Passage number ", 1)[1][0]) for prompt in prompts) == [0, 2, 4, 6]
    assert all(prompt.endswith("Question: How many?\nAnswer:") for prompt in prompts)
    found = json.loads((run / "audit" / "audit.json").read_text())
    told = found["agreement with strong"]["all"]
    assert (told["tasks"], told["agreement"], told["pass_rate"], told["pass_minus_agreement"]) == (4, 1.0, 0.5, -0.5)
    assert found["tasks"] == 8 and found["shares"]["exact duplicate"] == 7 / 8 and found["constant_gold"] == 7 / 8
    assert "answers 4 tasks" in capsys.readouterr().err
    assert audit.main(command) == 0 and "answers" not in capsys.readouterr().err and len(reader.calls) == 4
    assert audit.main([*command[:3], "--tasks", "8", "--answers", "3"]) == 0 and len(reader.calls) == 8
    told = json.loads((run / "audit" / "audit.json").read_text())["agreement with strong"]
    assert told["all"]["agreement"] == 0.5 and [part["tasks"] for part in told["parts"]] == [2, 2, 2, 2]
    assert told["all"]["low"] <= 0.5 <= told["all"]["high"]


def test_what_another_reader_of_the_same_name_answered_does_not_count(run, reader, gpu7):
    command = [str(run), "--reader", f"strong={gpu7.url}", "--tasks", "4", "--answers", "3"]
    assert audit.main(command) == 0 and len(reader.calls) == 4
    reader.script = lambda prompt, call: [" 9"] * 3
    gpu7.weights = "7"
    assert audit.main(command) == 0 and len(reader.calls) == 8, "other weights are another reader"
    told = json.loads((run / "audit" / "audit.json").read_text())["agreement with strong"]["all"]
    assert (told["tasks"], told["agreement"]) == (4, 0.0)
    gpu7.weights = "default"
    assert audit.main(command) == 0 and len(reader.calls) == 8
    told = json.loads((run / "audit" / "audit.json").read_text())["agreement with strong"]["all"]
    assert (told["tasks"], told["agreement"]) == (4, 1.0), "the first one's answers are still there"


def test_only_what_is_wanted_is_summed_up(run, reader, gpu7):
    def told() -> dict:
        return json.loads((run / "audit" / "audit.json").read_text())["agreement with strong"]

    command = [str(run), "--reader", f"strong={gpu7.url}", "--tasks"]
    assert audit.main([*command, "8", "--answers", "3"]) == 0 and told()["all"]["tasks"] == 8
    assert audit.main([*command, "4", "--answers", "3"]) == 0 and len(reader.calls) == 8, "all of the 4 are there"
    assert (told()["all"]["tasks"], told()["all"]["agreement"]) == (4, 1.0), "not the 8 that were asked before"
    reader.script = lambda prompt, call: [" 9"] * 2
    assert audit.main([*command, "4", "--answers", "2"]) == 0 and len(reader.calls) == 12
    assert (told()["all"]["tasks"], told()["all"]["agreement"]) == (4, 0.0), "of 2 answers each, not of 3"
    # A run that was begun anew in the same folder has other tasks in the same places.
    (run / "episodes.jsonl").write_text((run / "episodes.jsonl").read_text().replace("How many?", "How few?"))
    assert audit.main([*command, "4", "--answers", "2"]) == 0 and len(reader.calls) == 16 and told()["all"]["tasks"] == 4


def refusing(reader: Reader, status: int, numbers: set[int]) -> None:
    """From here on the reader refuses to read the passages with these numbers."""
    script = reader.script

    def refuse(prompt: str, call: int) -> list[str]:
        if int(prompt.rsplit("Passage number ", 1)[1][0]) in numbers:
            raise EngineRefused(f"engine: POST /generate was answered with {status}: longer than\nits last words", status)
        return script(prompt, call)

    reader.script = refuse


def test_a_task_that_the_reader_refuses_is_noted_and_the_others_are_asked(run, reader, gpu7, capsys):
    refusing(reader, 400, {2, 3})
    command = [str(run), "--reader", f"strong={gpu7.url}", "--tasks", "8", "--answers", "3"]
    assert audit.main(command) == 0
    assert "strong refused 2 of the tasks" in capsys.readouterr().err
    told = json.loads((run / "audit" / "audit.json").read_text())["agreement with strong"]
    assert (told["all"]["tasks"], told["all"]["agreement"], told["refused"]) == (6, 0.5, 2)
    lines = [json.loads(line) for line in (run / "audit" / "agreement-strong.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines if "refused" in line] == ["engine: POST /generate was answered with 400: longer than"] * 2
    assert audit.main(command) == 0 and len(reader.calls) == 8, "what was refused is not asked again either"


def test_a_reader_that_refuses_everything_or_for_another_reason_is_told(run, reader, gpu7, capsys):
    refusing(reader, 401, {4})
    command = [str(run), "--reader", f"strong={gpu7.url}", "--tasks", "8", "--answers", "3"]
    assert audit.main(command) == 1 and "401" in capsys.readouterr().err
    refusing(reader, 400, set(range(8)))
    assert audit.main([*command[:2], f"other={gpu7.url}", *command[3:]]) == 2
    assert "all 8 tasks were refused; the first: engine: POST /generate was answered with 400" in capsys.readouterr().err


def test_what_cannot_be_read_again_is_named(run, reader, gpu7, capsys, tmp_path):
    assert audit.main([str(run), "--reader", str(tmp_path / "nowhere")]) == 2
    assert "is not there" in capsys.readouterr().err
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("no_corpus: false", "no_corpus: true"))
    assert audit.main([str(run), "--reader", f"strong={gpu7.url}"]) == 2
    assert "without passages" in capsys.readouterr().err and not reader.calls
    assert audit.main([str(run), "--reader", f"strong={gpu7.url}", "--tasks", "0"]) == 2

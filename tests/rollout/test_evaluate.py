"""tools/evaluate.py on a real server: by ids, by OpenAI's interface, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_spice.rollout.supervisor import SglangEngine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(engine: SglangEngine, tiny_model: Path, tmp_path: Path):
    """Starts the tool on the shared server; `by_ids`: SGLang's own interface with the tokenizer here."""
    rows = [{"question": f"Which river is number {n}?", "answer": "7"} for n in range(24)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(output: str, *options: str, by_ids: bool = True, tasks: str = "gsm8k") -> subprocess.Popen[str]:
        key = engine.client._http.headers["Authorization"].removeprefix("Bearer ")
        arguments = [engine.client.url, "--tasks", tasks, "--data", str(tmp_path), "--style", "few_shot", "--output", str(tmp_path / output)]
        arguments += ["--tokenizer", str(tiny_model)] if by_ids else []
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "evaluate.py"), *arguments, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "SPICE_ENGINE_KEY": key},
        )  # fmt: skip

    return start


def records(folder: Path, task: str = "gsm8k") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()[1:]]


def test_stopped_and_gone_on_with(command, tmp_path):
    slow = ("--max-tokens", "60", "--in-flight", "1", "--temperature", "1", "--samples", "2")
    running = command("stopped", *slow)
    log = tmp_path / "stopped" / "gsm8k.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert running.poll() is None and time.monotonic() < deadline, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on from here" in errors
    before = records(tmp_path / "stopped")
    assert 1 <= len(before) < 24
    with open(log, "ab") as torn:  # as a machine that lost its power leaves it
        torn.write(b'{"id": "9", "ques')

    refused = command("stopped", *slow[:-1], "3")
    assert "samples was 2, is 3" in refused.communicate(timeout=120)[1] and refused.returncode == 2

    ended = command("stopped", *slow)
    table, errors = ended.communicate(timeout=120)
    assert ended.returncode == 0, errors
    after = records(tmp_path / "stopped")
    assert after[: len(before)] == before and sorted(int(record["id"]) for record in after) == list(range(1, 25))
    assert all(len(record["answers"]) == 2 for record in after)
    found = json.loads((tmp_path / "stopped" / "results.json").read_text())["tasks"][0]
    assert found["items"] == 24 and found["samples"] == 2 and "GSM8K" in table

    again = command("stopped", *slow, tasks="gsm8k")
    assert again.communicate(timeout=120)[0] == table and records(tmp_path / "stopped") == after


def test_text_and_ids_ask_the_same(command, tmp_path):
    both = [command("ids", "--max-tokens", "12"), command("text", "--max-tokens", "12", by_ids=False)]
    for each in both:
        _, errors = each.communicate(timeout=180)
        assert each.returncode == 0, errors
    ids, text = (
        {record["id"]: [(a["response"], a["tokens"], a["finish"]) for a in record["answers"]] for record in records(tmp_path / name)}
        for name in ("ids", "text")
    )
    assert len(ids) == len(text) == 24
    # The engine's text interface trims nothing either; greedy decoding of one model may still differ where two tokens tie.
    assert sum(ids[name] == text[name] for name in ids) >= 22


def test_a_wrong_key_and_no_server_are_said(command, engine, monkeypatch, tmp_path):
    tool, output = str(ROOT / "tools" / "evaluate.py"), ["--data", str(tmp_path), "--style", "few_shot", "--output", str(tmp_path / "x")]
    done = subprocess.run(
        [sys.executable, tool, engine.client.url, "--tasks", "gsm8k", *output], capture_output=True, text=True, timeout=120,
        env={**os.environ, "SPICE_ENGINE_KEY": "wrong"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "was answered with 401" in done.stderr and "Traceback" not in done.stderr

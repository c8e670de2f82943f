"""tools/evaluate.py on a Megatron checkpoint: exported, served by a real engine, asked, graded, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from small_models import add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)


def test_a_megatron_checkpoint_is_exported_served_and_asked(tmp_path):
    hf = add_tokenizer(make_model(tmp_path / "hf", "llama", tied=True, max_position_embeddings=512))
    made = run("tools/convert_checkpoint.py", "hf-to-megatron", hf, tmp_path / "megatron")
    assert made.returncode == 0, made.stderr
    rows = [{"problem": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(6)]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [{"question": "Which?", "options": [f"metal {n}" for n in range(10)], "answer": "J"}] * 3
    (tmp_path / "mmlu_pro.json").write_text(json.dumps(choices))
    output = tmp_path / "results"
    command = [
        "tools/evaluate.py", tmp_path / "megatron", "--tasks", "mmlu_pro,aime24", "--data", tmp_path, "--style", "few_shot",
        "--samples", 4, "--temperature", 0.6, "--max-tokens", 8, "--output", output, "--engine", "max_total_tokens=4096",
        "--engine", "threads=1",
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "results.json").read_text())
    assert [(task["column"], task["items"], task["samples"]) for task in found["tasks"]] == [("AIME24", 6, 4), ("MMLU-Pro", 3, 4)]
    assert done.stdout.index("AIME24") < done.stdout.index("MMLU-Pro")
    assert not list(output.glob("exported*")) and found["overall"] is None
    answers = [a for line in (output / "aime24.jsonl").read_text().splitlines()[1:] for a in json.loads(line)["answers"]]
    assert len(answers) == 24 and all(1 <= answer["tokens"] <= 8 for answer in answers)
    assert len({answer["response"] for answer in answers}) > 12, "samples of a temperature differ"

    # All is answered: the same command says the same without a model, and a changed one is refused.
    assert run(*command).stdout == done.stdout
    refused = run(*[9 if part == 8 else part for part in command])
    assert refused.returncode == 2 and "max_tokens was 8, is 9" in refused.stderr

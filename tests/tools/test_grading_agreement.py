"""The committed comparison with other graders is of the verifier as it is, and every disagreement in it is explained."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "grading"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("grading_agreement", ROOT / "tools" / "grading_agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def test_our_verdicts_are_the_committed_ones(tool):
    generations, verdicts = lines("generations.jsonl"), lines("verdicts.jsonl")
    assert [each["id"] for each in generations] == [each["id"] for each in verdicts] and len(generations) > 300
    found = asyncio.run(tool.ours(generations))
    changed = [each["id"] for each, (correct, _, _) in zip(verdicts, found, strict=True) if each["ours"] != correct]
    assert changed == [], "run tools/grading_agreement.py again and look at what changed"


def test_every_disagreement_is_listed_with_an_explanation(tool):
    listed = (RESULTS / "disagreements.md").read_text(encoding="utf-8")
    count = 0
    for each in lines("verdicts.jsonl"):
        different = {rival for rival in tool.RIVALS if each[rival] not in (None, each["ours"])}
        assert different == set(each["differs"]), each["id"]
        assert not different or f"`{each['id']}`" in listed
        assert set(each["differs"].values()) <= set(tool.EXPLANATIONS)
        count += len(different)
    assert listed.count("\n- `") == count


def test_the_harness_itself_says_the_same(tool):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: the committed verdicts of it are not made again")
    harness = tool.Harness()
    for each, verdict in zip(lines("generations.jsonl"), lines("verdicts.jsonl"), strict=True):
        assert harness.math(each) == verdict["lm_eval_math"], each["id"]

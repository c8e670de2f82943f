"""Weak scaling with simulated compute: a small real run, and the arithmetic of what it is held against."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import scaling_benchmark  # noqa: E402
from scaling_ranks import play_seconds  # noqa: E402
from simulated_engine import Pace, lengths, request_seconds  # noqa: E402

PACE = Pace(**scaling_benchmark.PACE, vocabulary=400, seed=3)


def episode(slot: int, challenger: int, reasoner: int) -> dict:
    return {"slot": slot, "attempts": [{"tokens": challenger, "answers": [{"tokens": reasoner}] if reasoner else []}]}


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 16)), min_size=1, max_size=30), st.integers(1, 8))
def test_games_take_at_least_their_share_and_at_most_one_after_the_other(games, players):
    episodes = [episode(slot, *game) for slot, game in enumerate(games)]
    each = [play_seconds([one], PACE, 1) for one in episodes]
    together = play_seconds(episodes, PACE, players)
    assert max(max(each), sum(each) / players) <= together + 1e-9 and together <= sum(each) + 1e-9


def test_lengths_are_drawn_from_the_prompt_and_have_a_long_tail():
    drawing = replace(PACE, tails=True)
    once, _ = lengths(drawing, [1, 2, 3], 500, 64, challenger=True)
    again, _ = lengths(drawing, [1, 2, 3], 500, 64, challenger=True)
    others, _ = lengths(drawing, [1, 2, 4], 500, 64, challenger=True)
    assert once == again != others and sorted(once) != sorted(others)
    assert max(once) == 64 and sorted(once)[250] < 32 and min(once) >= 1
    assert request_seconds(PACE, 10) == pytest.approx(PACE.prefill + 10 * PACE.per_token)


@given(st.lists(st.integers(0, 500), max_size=20), st.integers(1, 64), st.booleans())
def test_without_tails_every_request_takes_as_long_and_has_the_same_middle(prompt, count, challenger):
    found, _ = lengths(PACE, prompt, count, 10**6, challenger)
    others, _ = lengths(PACE, [*prompt, 1], count, 10**6, challenger)
    assert sorted(found) == sorted(others)
    median = PACE.challenger_tokens if challenger else PACE.reasoner_tokens
    assert sorted(found)[(count - 1) // 2] <= median <= sorted(found)[count // 2]


@pytest.mark.timeout(300)
def test_two_ranks_play_train_and_save(tmp_path):
    command = [
        sys.executable, str(ROOT / "tools" / "benchmark.py"), "scaling", "--ranks", "1,2", "--iterations", "1", "--passages", "2",
        "--pace", "0.1", "--output", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scaling.json").read_text())
    one, two = scaling_benchmark.summary(report["results"])
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["efficiency"] == 1.0
    for row in (one, two):
        assert 0 < row["expected_seconds"] < row["seconds"], "an iteration takes its waits and something more"
        assert row["phases"]["play"] >= row["expected"]["play"] and row["phases"]["train"] >= row["expected"]["train"]
        assert row["processor_seconds"] > 0 and row["predicted_seconds"] > row["expected_seconds"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file, least", [("scaling", 0.95), ("first", 0.95), ("tails", 0.93)])
def test_committed_results_scale_and_are_predicted(file: str, least: float):
    report = json.loads((ROOT / "docs" / "results" / "scaling-cpu" / f"{file}.json").read_text())
    rows = scaling_benchmark.summary(report["results"])
    assert (rows[0]["ranks"], rows[-1]["ranks"]) == (1, 32)
    for row in rows:
        assert row["efficiency"] >= least, f"{row['ranks']} ranks"
        assert abs(row["predicted_seconds"] / row["seconds"] - 1) < 0.15

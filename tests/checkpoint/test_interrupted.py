"""A run that is killed at random moments, also in the middle of a save, goes on as if it had not been.

Two dozen moments by default, in two runs; SPICE_MOMENTS says how many. `interrupted.py` says what a moment is and what is
compared after it. What is left to chance is drawn anew each time, and printed: SPICE_MOMENTS_SEED repeats it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

PROGRAM = Path(__file__).with_name("interrupted.py")
MOMENTS = int(os.environ.get("SPICE_MOMENTS", "24"))
A_RUN = 12  # moments
SEED = int(os.environ.get("SPICE_MOMENTS_SEED", time.time_ns() % 1000))


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("interrupted")
    recipe = tiny_recipe(folder / "recipe")
    sizes = [A_RUN] * (MOMENTS // A_RUN) + [MOMENTS % A_RUN] * (MOMENTS % A_RUN > 0)
    command = [sys.executable, PROGRAM, recipe, folder, ",".join(map(str, sizes)), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30 + 30 * MOMENTS, check=False)
    assert done.returncode == 0, f"SPICE_MOMENTS_SEED={SEED}\n{done.stderr[-3000:]}\n{_last_words(folder)}"
    return json.loads((folder / "results.json").read_text())


def _last_words(folder: Path) -> str:
    logs = sorted(folder.glob("*/*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1].read_text()[-3000:] if logs else ""


@pytest.mark.timeout(60 + 30 * MOMENTS)
def test_an_interrupted_run_plays_and_learns_what_an_uninterrupted_one_does(campaigns):
    """Same passages, same tokens, same weights and optimiser state, bit for bit. That no checkpoint was unreadable, and that what
    was loaded is what had been saved, is checked after each moment."""
    print(f"SPICE_MOMENTS_SEED={SEED}")
    assert sum(len(each["moments"]) for each in campaigns) == MOMENTS
    for each in campaigns:
        assert each["same"], f"a run of {each['iterations']} iterations differs from one without interruption"
        assert len(each["outcome"]["played"]) == 2 * each["iterations"]


def test_moments_were_all_over_the_run(campaigns):
    """In each step of a save, and in a load, too."""
    print(f"SPICE_MOMENTS_SEED={SEED}")
    moments = [moment for each in campaigns for moment in each["moments"]]
    assert {tuple(moment["victims"]) for moment in moments} == {(0,), (1,), (0, 1)}
    assert any(moment["partial"] for moment in moments), "none was in a save"
    assert any(not moment["partial"] for moment in moments), "all were in a save"
    assert len({moment["whole"][-1] for moment in moments if moment["whole"]}) > len(campaigns), "no run came further"
    aimed = [moment["aim"][0] for moment in moments if moment["aim"]]
    assert {moment["aim"][0] for moment in moments if moment["hit"]} == set(aimed), "an aim was not reached"
    assert MOMENTS < 2 * A_RUN or set(aimed) == set(campaigns[0]["aims"])

"""A run that is asked to end while it plays is saved at once, from a policy that sleeps, while its engines are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from megatron_spice.cluster.exit_codes import INTERRUPTED

PROGRAM = Path(__file__).with_name("asked_to_end.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("asked")
    command = [sys.executable, PROGRAM, tiny_recipe(folder / "recipe"), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(480)
@pytest.mark.parametrize("name, saved", [
    ("unsaved", [2]),
    ("in a save", [2, 3]),  # that of an earlier iteration is under way still
])  # fmt: skip
def test_a_sleeping_policy_is_saved_while_the_engines_are_killed(found, name, saved):
    """It goes on to what a run that nobody asks comes to: same passages, tokens, weights and optimiser state, bit for bit."""
    asked, resumed, through = found[name]["asked"], found[name]["resumed"], found["through"]
    assert (asked["codes"], asked["whole"]) == ([INTERRUPTED] * 2, saved)
    assert resumed["codes"] == through["codes"] == [0, 0]
    assert resumed["came_to"] == through["came_to"]

"""A file system that is full or gone: the run ends with the reason, its checkpoints are whole, and it goes on afterwards.

On small tmpfs of its own, one for each case (storage.py), which takes root to mount.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

PROGRAM = Path(__file__).with_name("storage.py")
# What is full or gone, and when: what the run says of it. A line of metrics may find room in a page that is there already.
CASES = {
    "room": r"iteration_0000003 could not be written: [\d.]+ MB are needed and .* has [\d.]+ MB free; make room for [\d.]+ MB",
    "file": r"iteration_\d+ could not be written: .*No space left on device; earlier checkpoints are still there",
    "index": r"iteration_0000003 could not be written: .*No space left on device",
    "state": r"iteration_0000003 could not be written: .*No space left on device",
    "episodes": r"episodes.jsonl could not be written: No space left on device; make room on its file system",
    "metrics": r"(metrics.jsonl|iteration_0000003) could not be written: .*make room",
    "removed": r"episodes.jsonl could not be written: .*see that its folder is there",
    "unmounted": r"iteration_0000003 could not be written: .*/run is not the folder that the run began in",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("storage")
    (folder / "try").mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "none", folder / "try"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    subprocess.run(["umount", folder / "try"], check=True)
    recipe = tiny_recipe(folder / "recipe")
    done = subprocess.run([sys.executable, PROGRAM, recipe, folder], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_cannot_write_ends_with_the_reason_and_goes_on_when_it_can(found, name):
    """Every checkpoint that is there was found whole, and the run that went on came to what one without trouble does."""
    result = found[name]
    assert result["codes"]["0"] == 1 and 0 not in result["codes"].values()
    assert re.search(CASES[name], result["log"]), result["log"][-2000:]
    assert "start the same command again: it goes on from the newest" in result["log"]
    # Where it is not a save that failed, the last one may have been under way still.
    assert result["whole"] == [] if name == "removed" else len(result["whole"]) in ((1, 2) if name in ("episodes", "metrics") else (2,))
    assert result["same"]
    assert not result["left_behind"], "it began a new run folder under the mount"

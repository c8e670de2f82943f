"""Optimisers that keep other books than torch's: fused ones, alone and beside torch's on the host, are saved and loaded alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

ON_RANKS = Path(__file__).with_name("fused_adam_on_ranks.py")
# name -> (fused, share offloaded)
KINDS = {"torch": (False, 0.0), "fused": (True, 0.0), "half fused": (True, 0.5), "offloaded": (True, 1.0)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    """(kind, updates before the save) -> what was seen; two data-parallel ranks."""
    model = make_model(tmp_path_factory.mktemp("qwen3") / "hf", "qwen3", tied=True)
    jobs = {}
    for kind, (fused, share) in KINDS.items():
        for updates in (0, 2):
            folder = tmp_path_factory.mktemp("saved") / "weights"
            folder.mkdir()
            jobs[kind, updates] = {"model": model, "trajectories": some_trajectories(), "folder": folder, "fused": fused,
                                   "updates": updates, "optimizer_offload": share, "adam_eps": 1e-3}  # fmt: skip
    return dict(zip(jobs, run_ranks(2, ON_RANKS, "in_turn", list(jobs.values()))[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [0, 2])
def test_a_resumed_run_goes_on_as_torchs_does(results, kind, updates):
    """Saved before the first step too: a run whose first iterations had nothing to learn from saves all the same."""
    result, expected = results[kind, updates], results["torch", updates]
    assert len(result["updates"]) == updates + 2
    for update, wanted in zip(result["updates"], expected["updates"]):
        assert update["policy/grad_norm"] == pytest.approx(wanted["policy/grad_norm"], rel=1e-3)
    for name, weight in expected["weights"].items():
        # Rounded at another place, here and there the last bit of a bfloat16 is another.
        np.testing.assert_allclose(result["weights"][name], weight, rtol=2**-7, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("updates", [0, 2])
def test_every_part_counts_every_step(results, updates):
    """Counts that are handed down before each step would stand still from the second one after a resume."""
    steps = updates + 2
    assert results["torch", updates]["steps"] == {("AdamW", steps)}
    assert results["fused", updates]["steps"] == {("FusedAdam", steps)}
    assert results["half fused", updates]["steps"] == {("FusedAdam", steps), ("AdamW", steps)}
    assert results["offloaded", updates]["steps"] == {("AdamW", steps)}


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_all_there_before_the_first_step(results, kind):
    """Host memory for it to sleep in is taken once."""
    before, after = results[kind, 2]["held"]
    assert before == after > 0

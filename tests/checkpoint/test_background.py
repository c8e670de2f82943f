"""A checkpoint is what the run was when it was begun, however the run goes on while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories

from megatron_spice.checkpoint import store

ON_RANKS = Path(__file__).with_name("background_on_ranks.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", tied=True)


def test_a_run_that_goes_on_while_it_is_saved(model, tmp_path):
    """Data parallel: the optimiser is divided among the ranks."""
    ranks = run_ranks(2, ON_RANKS, "save_while_learning", model, tmp_path / "run", some_trajectories(), {})
    [whole] = store.whole_checkpoints(store.folder_of(tmp_path / "run"))
    on_disk = sum(file.stat().st_size for file in whole.rglob("*.distcp"))
    for found in ranks:
        assert found["early"] is None, "the disk was to be slow"
        assert found["again"] == found["then"], "the checkpoint holds what the policy became later"
        assert found["news"]["save/write_seconds"] > 1.0 and found["news"]["save/gib"] * 2**30 == pytest.approx(on_disk, rel=0.05)
        assert found["later"] == {}, "a save is told of once"
    assert store.read_state(whole) == {"iteration": 1, "counter": {"drawn": 7}}


def test_a_save_of_which_nothing_is_written_yet_is_written_at_the_end(model, tmp_path):
    """Also a number without dimensions comes back."""
    assert run_ranks(1, ON_RANKS, "close_before_writing", model, tmp_path / "run") == [([1.0, 2.0, 3.0], 7.0)]
    [whole] = store.whole_checkpoints(store.folder_of(tmp_path / "run"))
    assert store.read_state(whole) == {"iteration": 5}


def test_a_rank_that_cannot_write_ends_the_save_on_all(model, tmp_path):
    ranks = run_ranks(2, ON_RANKS, "save_to_a_full_disk", model, tmp_path / "run", {"pipeline_parallel_size": 2})
    for found in ranks:
        assert "iteration_0000002 could not be written" in found and "earlier checkpoints are still there" in found
    assert any("File too large" in found for found in ranks)
    assert [path.name for path in store.whole_checkpoints(store.folder_of(tmp_path / "run"))] == ["iteration_0000001"]


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_run_that_has_lost_its_folder_hears_of_it_on_all_ranks_and_leaves_nothing(model, tmp_path, while_writing):
    for found in run_ranks(2, ON_RANKS, "lose_the_folder", model, tmp_path / "run", while_writing):
        assert "run belongs to job 41 restart 1 (process" in found and "has lost it and ends" in found, found
    assert [path.name for path in store.folder_of(tmp_path / "run").iterdir()] == ["iteration_0000001"]

"""A checkpoint is there whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_spice.checkpoint import store


def _save(folder, iteration, keep=2):
    partial = store.begin(folder, iteration)
    (partial / store.WEIGHTS / "data").write_text(str(iteration))
    return store.finish(partial, {"iteration": iteration}, keep)


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (2, 4, 6, 10):
        _save(tmp_path, iteration)
    assert [path.name for path in store.whole_checkpoints(tmp_path)] == ["iteration_0000006", "iteration_0000010"]
    assert store.read_state(store.whole_checkpoints(tmp_path)[-1]) == {"iteration": 10}


def test_an_interrupted_save_is_never_taken_for_whole(tmp_path):
    _save(tmp_path, 2)
    store.begin(tmp_path, 4)  # and then the machine goes down
    (tmp_path / "iteration_0000008").mkdir()  # a folder that somebody made by hand
    assert [path.name for path in store.whole_checkpoints(tmp_path)] == ["iteration_0000002"]
    _save(tmp_path, 4)
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_just_saved_is_never_the_one_removed(tmp_path):
    for iteration in (40, 50, 10):  # the last by a run that began anew in the same folder
        final = _save(tmp_path, iteration)
        assert final.is_dir()


def test_saving_an_iteration_again_replaces_it(tmp_path):
    _save(tmp_path, 2)
    final = _save(tmp_path, 2)
    assert (final / store.WEIGHTS / "data").read_text() == "2"


@pytest.fixture
def nfs(monkeypatch) -> None:
    """Files that somebody has open, on NFS: one that is removed stays under another name, which cannot be removed."""
    unlink = os.unlink

    def rename(path, *, dir_fd=None):
        if dir_fd is None:
            return unlink(path)
        if str(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        return os.rename(path, f".nfs{path}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", rename)


def test_what_cannot_be_removed_ends_no_save(tmp_path, nfs):
    for iteration in (2, 4, 6, 8, 2, 4, 4):
        assert _save(tmp_path, iteration, keep=1).is_dir()
    assert [path.name for path in store.whole_checkpoints(tmp_path)] == ["iteration_0000004"]
    assert list(tmp_path.glob("*.old.partial")), "everything could be removed"


def test_a_folder_to_save_into_is_empty(tmp_path, nfs):
    for iteration in (2, 2, 4):
        partial = store.begin(tmp_path, iteration)
        assert [path.name for path in partial.rglob("*")] == [store.WEIGHTS]
        (partial / store.WEIGHTS / "data").touch()


def test_leftovers_of_another_start_are_removed_and_none_of_them_is_made_whole(tmp_path):
    left = store.begin(tmp_path, 2, attempt="first")
    mine = store.begin(tmp_path, 2, attempt="second")
    assert left != mine and [path for path in tmp_path.iterdir()] == [mine]
    with pytest.raises(OSError):
        store.finish(left, {"iteration": 2}, 2)
    assert not store.whole_checkpoints(tmp_path)

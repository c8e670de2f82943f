"""Where caches of compiled kernels go on a node."""

from __future__ import annotations

import os

from megatron_spice.cluster.scratch import FOLDERS, cache_folders


def test_caches_go_where_the_site_says_then_where_slurm_says(tmp_path):
    job = {"SLURM_JOB_ID": "1", "SLURM_TMPDIR": str(tmp_path / "job")}
    (tmp_path / "job").mkdir()
    (tmp_path / "site").mkdir()
    found = cache_folders({**job, "SPICE_SCRATCH": str(tmp_path / "site")})
    assert found.keys() == FOLDERS.keys() and all(value.startswith(f"{tmp_path}/site/spice-") for value in found.values())
    assert all(os.path.isdir(value) for value in found.values())
    assert cache_folders(job)["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/job/spice-")
    made = cache_folders({**job, "SPICE_SCRATCH": str(tmp_path / "site" / "not" / "yet")})
    assert made["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/site/not/yet/spice-")


def test_a_place_that_cannot_be_used_is_told_and_the_next_one_taken(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "job").mkdir()
    job = {"SLURM_JOB_ID": "1", "SLURM_TMPDIR": str(tmp_path / "job")}
    scratch = {"SPICE_SCRATCH": str(tmp_path / "file" / "below")}
    assert cache_folders(job | scratch)["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/job/spice-")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"SPICE_SCRATCH={tmp_path}/file/below" in told and f"{tmp_path}/job will be" in told
    assert cache_folders(scratch) == {} and "the libraries' own places will be" in capsys.readouterr().err

    [folder] = {os.path.dirname(value) for value in cache_folders({"SPICE_SCRATCH": str(tmp_path / "site")}).values()}
    os.rmdir(f"{folder}/triton")
    open(f"{folder}/triton", "w").close()
    assert capsys.readouterr().err == ""
    found = cache_folders({**job, "SPICE_SCRATCH": str(tmp_path / "site")})
    assert all(value.startswith(f"{tmp_path}/job/spice-") for value in found.values()) and "triton" in capsys.readouterr().err


def test_what_is_set_is_left_alone_and_a_single_machine_too(tmp_path):
    assert cache_folders({"TMPDIR": str(tmp_path)}) == {} and list(tmp_path.iterdir()) == []
    assert "TRITON_CACHE_DIR" not in cache_folders({"SPICE_SCRATCH": str(tmp_path), "TRITON_CACHE_DIR": "/mine"})


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path):
    """Whoever can write there can have their code run by us."""
    environment = {"SPICE_SCRATCH": str(tmp_path)}
    [folder] = {os.path.dirname(value) for value in cache_folders(environment).values()}
    assert os.stat(folder).st_mode & 0o777 == 0o700
    os.chmod(folder, 0o777)
    assert cache_folders(environment) == {}
    os.rename(folder, tmp_path / "elsewhere")
    os.chmod(tmp_path / "elsewhere", 0o700)
    os.symlink(tmp_path / "elsewhere", folder)
    assert cache_folders(environment) == {}

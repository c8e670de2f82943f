"""A conversion is there whole or not at all; it is taken up where it was stopped, by one process at a time, for one source."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from hf_folders import assert_same_model, read_tensors, write_model, write_tensors

from megatron_spice.convert import job, target
from megatron_spice.convert.find import open_source
from megatron_spice.convert.hf_target import HFTarget
from megatron_spice.convert.mp_rank_layout import make_layout
from megatron_spice.convert.mp_rank_target import MpRankTarget
from megatron_spice.convert.torch_dist_target import TorchDistTarget
from megatron_spice.convert.workers import Progress, WorkerFailed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
TARGETS = {
    "torch_dist": TorchDistTarget,
    "mp_rank": lambda source: MpRankTarget(source, make_layout(source.architecture, 2, 2, 1, 1), "local"),
    "hf": HFTarget,
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of a few kilobytes, so that a small model has many."""
    monkeypatch.setattr(target, "SMALLEST_PART", 2**12)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "hf", "qwen2")


def _convert(
    model: Path, kind: str, folder: Path, written: list[int], fail_at: int | None = None, processes: int = 1, how=None, first=None
) -> None:
    """Converts, noting the number of each part as it is written. Each begins with `first`; part `fail_at` ends as `how` does."""
    source = open_source(model)
    made = TARGETS[kind](source)
    write = made.write
    log = folder.with_name("log")

    def noting(part, *rest):
        with open(log, "a") as file:
            file.write(f"{part.number}\n")
        if first is not None:
            first()
        record = write(part, *rest)
        if part.number == fail_at:
            how()
        return record

    made.write = noting
    log.write_text("")
    try:
        job.convert(source, made, folder, {}, processes, "test")
    finally:
        written += map(int, log.read_text().split())


def _no_space() -> None:
    raise OSError(28, "No space left on device")


def _killed() -> None:
    time.sleep(0.5)  # the parts before are on their way to the disk
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("how", [_no_space, _killed], ids=["disk full", "killed"])
def test_it_goes_on_where_it_was_stopped(model, tmp_path, kind, how):
    first, second = [], []
    with pytest.raises((ValueError, WorkerFailed), match="no space left .* the same command|ended by signal 9"):
        _convert(model, kind, tmp_path / "out", first, fail_at=3, how=how)
    assert not (tmp_path / "out").exists() and first == [0, 1, 2, 3]
    _convert(model, kind, tmp_path / "out", second, processes=2)
    assert sorted(second) == list(range(3, max(second) + 1)) and max(second) > 4
    _convert(model, kind, tmp_path / "through", [])
    files = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "through" / name).read_bytes(), name
    assert not any(".convert" in str(name) for name in files) and not (tmp_path / "out.partial").exists()


def test_one_that_is_not_wanted_any_more_ends_with_its_processes_and_is_gone_on_with(model, tmp_path):
    source, folder = open_source(model), tmp_path / "out"
    made = HFTarget(source)
    write = made.write

    def slowly(*arguments):
        time.sleep(0.3)
        return write(*arguments)

    made.write = slowly
    records = tmp_path / "out.partial" / job.STATE
    there = set(psutil.Process().children())  # of earlier tests: multiprocessing keeps a tracker
    with pytest.raises(job.Stopped, match="out: stopped while it was written"):
        job.convert(source, made, folder, {}, 1, "test", is_stopped=lambda: any(records.glob("part-*")))
    kept = len(list(records.glob("part-*")))
    assert 1 <= kept < len(made.parts) and not folder.exists() and set(psutil.Process().children()) <= there
    written: list[int] = []
    _convert(model, "hf", folder, written)
    assert len(written) == len(made.parts) - kept
    assert_same_model(model, folder)


def test_a_source_that_changed_meanwhile_or_another_request_is_refused(model, tmp_path):
    with pytest.raises(ValueError):
        _convert(model, "hf", tmp_path / "out", [], fail_at=2, how=_no_space)
    with pytest.raises(ValueError, match="another source, files"):
        _convert(write_model(tmp_path / "other", "llama"), "torch_dist", tmp_path / "out", [])
    write_tensors(model, {name: tensor + 1 for name, tensor in read_tensors(model).items()})
    with pytest.raises(ValueError, match="the source has changed since; remove it"):
        _convert(model, "hf", tmp_path / "out", [])
    shutil.rmtree(tmp_path / "out.partial")
    _convert(model, "hf", tmp_path / "out", [])
    assert_same_model(model, tmp_path / "out")


def test_a_folder_that_is_there_is_left_as_it_is(model, tmp_path):
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    with pytest.raises(ValueError, match="out exists; remove it"):
        _convert(model, "hf", tmp_path / "out", [])
    with pytest.raises(ValueError, match="holds files of something else"):
        _convert(model, "hf", tmp_path / "other", [])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists"):
        _convert(model, "hf", tmp_path / "link", [])
    assert [(tmp_path / name / "precious").read_text() for name in ("out", "other.partial")] == ["mine", "mine"]


def test_two_at_once_are_kept_apart(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing"):
        _convert(model, "hf", tmp_path / "out", [])
    os.close(descriptor)
    _convert(model, "hf", tmp_path / "out", [])
    assert_same_model(model, tmp_path / "out")


def test_space_is_looked_for_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(ValueError, match="has room for 0.00 GB"):
        _convert(model, "torch_dist", tmp_path / "out", [])
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out.partial/weights"))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_write_that_the_system_refuses_is_an_error_and_no_target(model, tmp_path, kind):
    """A limit on the size of files stands for a full disk: the system call fails in the middle of a tensor."""

    def limit() -> None:  # in the process that writes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))

    with pytest.raises(OSError, match="File too large"):
        _convert(model, kind, tmp_path / "out", [], first=limit)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_a_terminated_tool_ends_its_processes_and_goes_on_the_next_time(model, tmp_path):
    """SIGTERM in the middle; every part takes a while, so that the middle is long."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, state = tmp_path / "out", tmp_path / "out.partial" / ".convert"

    def slow() -> None:
        with open(tmp_path / "pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)

    def run() -> None:
        signal.signal(signal.SIGTERM, tool._stopped)
        try:
            _convert(model, "hf", out, [], processes=2, first=slow)
        except KeyboardInterrupt:
            os._exit(130)

    running = multiprocessing.get_context("fork").Process(target=run)
    running.start()
    while running.is_alive() and not list(state.glob("part-*.json")):
        time.sleep(0.01)
    running.terminate()
    running.join(20)
    assert running.exitcode == 130 and not out.exists()
    assert not [pid for pid in set((tmp_path / "pids").read_text().split()) if psutil.pid_exists(int(pid))]
    kept = len(list(state.glob("part-*.json")))
    assert 0 < kept < json.loads((state / "request.json").read_text())["parts"]
    second: list[int] = []
    _convert(model, "hf", out, second)
    assert len(second) == max(second) + 1 - kept, "what was there was written again"
    assert_same_model(model, out)


def test_progress_is_told_in_a_line(capsys):
    progress = Progress("hf-to-megatron", total=16_000_000_000, done=4_000_000_000)
    assert progress.line(4_000_000_000, 4.0).strip() == "hf-to-megatron: 50 % of 16.0 GB, 1.00 GB/s, 8 s left"
    progress(1)
    progress.end()
    assert capsys.readouterr().err == "", "nothing is printed more often than every ten seconds where it cannot be renewed"

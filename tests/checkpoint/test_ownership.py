"""A run's folder is one start's at a time, and what is in it is whole whoever wrote it, in whatever order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.checkpoint import ownership, store
from megatron_spice.checkpoint.ownership import Displaced, Owner, Ownership, in_use
from megatron_spice.config.errors import ConfigError
from megatron_spice.telemetry.json_lines import JsonLines, read_json_lines

ROOT = Path(__file__).resolve().parents[2]
HOLDER = "import sys; from pathlib import Path; from megatron_spice.checkpoint.ownership import Ownership; " \
    "held = Ownership(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


class Holder:
    """Another process that holds the folder until it is closed, or killed."""

    def __init__(self, run_dir: Path, **more: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run_dir)], env={**clean, "PYTHONPATH": str(ROOT), **more}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


def elsewhere(**more: object) -> Owner:
    """A start on another machine."""
    return replace(Owner.this(), host="n7", machine="another", process=17, **more)


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """A Slurm that gives one answer after the other, the last again and again; an empty one is an error."""
    (folder / "tools").mkdir()
    (folder / "tools" / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    script = '#!/bin/sh\ncd "$(dirname "$0")"; now="$(head -n1 answers)"; [ "$(wc -l <answers)" = 1 ] || sed -i 1d answers; echo "$now"; [ -n "$now" ]\n'
    (folder / "tools" / "squeue").write_text(script)
    (folder / "tools" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'tools'}{os.pathsep}{os.environ['PATH']}")


def test_while_its_owner_lives_a_folder_is_refused_with_the_remedy_and_then_it_is_free(tmp_path):
    run_dir = tmp_path / "run"
    assert in_use(run_dir) is None and not run_dir.exists()
    with Holder(run_dir) as holder:
        with pytest.raises(ConfigError) as refused:
            Ownership(run_dir)
        for part in (f"run.dir={run_dir} is in use", f"process {holder.process.pid} on", f"`kill {holder.process.pid}`", "another run.dir"):
            assert part in str(refused.value)
    with Ownership(run_dir) as mine:
        mine.check()


def test_a_second_start_of_a_recipe_is_refused_before_anything_starts(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_recipe import tiny_recipe

    recipe, run_dir = tiny_recipe(tmp_path / "recipe"), tmp_path / "run"
    command = [sys.executable, "-m", "megatron_spice", "launch-env", str(recipe), f"run.dir={run_dir}"]
    with Holder(run_dir):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        assert done.returncode == 2 and f"run.dir={run_dir} is in use: launch by hand" in done.stderr and not done.stdout
    assert subprocess.run(command, capture_output=True, timeout=60, cwd=ROOT, check=False).returncode == 0


def test_an_owner_that_numbers_processes_for_itself_is_known_by_its_lock(tmp_path, monkeypatch):
    """As in a container, or on another node of a file system that has locks for all."""
    with Holder(tmp_path):
        monkeypatch.setattr(ownership, "_machine", lambda: "another container")
        assert "holds its lock" in in_use(tmp_path)
    assert in_use(tmp_path) is None


def test_a_process_that_has_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    with Holder(tmp_path) as holder:
        owner = ownership.owner_of(tmp_path)
        assert owner.process == holder.process.pid
        ownership._write(tmp_path / ownership.NAME, ownership.json.dumps(ownership.asdict(replace(owner, began="1"))), "x")
        assert in_use(tmp_path) is None


def test_a_newer_start_of_the_same_job_takes_over_and_the_older_one_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with Holder(tmp_path, SLURM_JOB_ID="41"):
        assert "is running" in in_use(tmp_path), "the same start"
        older = Ownership.__new__(Ownership)
        older.run_dir, older.mine = tmp_path, ownership.owner_of(tmp_path)
        older.check()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with Ownership(tmp_path) as mine, pytest.raises(Displaced, match=r"belongs to job 41 restart 1 .* job 41 restart 0 .*has lost it"):
            mine.check()
            older.check()
    with pytest.raises(Displaced):  # also when the newer one has ended
        older.check()
    assert not Owner.this().follows(replace(Owner.this(), job="", restart=0)) and not elsewhere(restart=0, job="40").follows(elsewhere())


@pytest.mark.parametrize(("answers", "part"), [
    (["RUNNING"], "is RUNNING, says Slurm; wait for it, end it (`scancel 40`; it saves)"), ([""], None), (["COMPLETED"], None),
    (["COMPLETING", "COMPLETING", "COMPLETED"], None),
])  # fmt: skip
def test_slurm_says_whether_a_job_on_other_nodes_lives(tmp_path, monkeypatch, answers, part):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    squeue(tmp_path, monkeypatch, *answers)
    monkeypatch.setattr(ownership.time, "sleep", lambda seconds: None)
    Ownership(tmp_path, elsewhere(job="40")).close()
    problem = in_use(tmp_path)
    assert problem is None if part is None else part in problem
    if part:
        (tmp_path / ownership.ENDED).write_text(ownership.owner_of(tmp_path).token)  # an allocation in which the run is over
        assert in_use(tmp_path) is None


def test_a_start_that_has_lost_the_folder_says_nothing_of_the_end_of_the_one_that_has_it(tmp_path, monkeypatch):
    """Or an allocation that lives longer than its run would hold the folder for ever."""
    squeue(tmp_path, monkeypatch, "RUNNING")
    older, newer = elsewhere(job="41", restart=0), replace(elsewhere(job="41", restart=1), token="newer")
    with Ownership(tmp_path, older):
        with Ownership(tmp_path, newer):
            assert "is RUNNING, says Slurm" in in_use(tmp_path)
        assert in_use(tmp_path) is None
    assert in_use(tmp_path) is None


class Turns:
    """Runs threads in turn, each as far as so many points; who is out of turns runs to its end."""

    def __init__(self, slices: list[int]) -> None:
        self._slices, self._now, self._left = iter(slices), 0, 0
        self._changed = threading.Condition()
        self._ended = [False, False]
        self._me = threading.local()
        self._next()

    def _next(self) -> None:
        self._left = next(self._slices, 10**9)

    def point(self) -> None:
        if (me := getattr(self._me, "number", None)) is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._now == me)
            self._left -= 1
            if self._left <= 0 and not self._ended[1 - me]:
                self._now = 1 - me
                self._next()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._now == me)

    def run(self, *works: Callable[[], None]) -> None:
        def body(number: int, work: Callable[[], None]) -> None:
            self._me.number = number
            try:
                self.point()
                work()
            finally:
                with self._changed:
                    self._ended[number], self._now = True, 1 - number
                    self._changed.notify_all()

        threads = [threading.Thread(target=body, args=each) for each in enumerate(works)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
            assert not each.is_alive(), "they wait for each other"


def saving_run(run_dir: Path, owner: Owner, point: Callable[[], None], told: list[str]) -> None:
    """A start's life: takes the folder, goes on from the newest checkpoint, and saves twice."""
    try:
        hold = Ownership(run_dir, owner)
        point()
        folder = store.folder_of(run_dir)
        done = max([store.iteration_of(path) for path in store.whole_checkpoints(folder)], default=0)
        log = JsonLines(run_dir / "log.jsonl", done, hold.check)
        for iteration in (done + 1, done + 2):
            point()
            log.write([{"iteration": iteration, "by": owner.token}])
            point()
            partial = store.begin(folder, iteration, attempt=owner.token, look=hold.check)
            for number in range(2):
                point()
                (partial / store.WEIGHTS / f"__{number}_0.distcp").write_text(owner.token)
            point()
            store.finish(partial, {"iteration": iteration, "by": owner.token}, 2, hold.check)
        told.append("ended")
    except Displaced:
        told.append("displaced")
    except OSError as error:
        told.append(f"failed: {error}")


@given(st.lists(st.integers(1, 12), max_size=12))
@settings(deadline=None, max_examples=150)
def test_two_starts_that_write_in_turn_leave_whole_checkpoints_and_a_log_of_the_one_that_stays(tmp_path_factory, slices):
    """Whoever was first is an earlier start of the same job, which lives on though Slurm took it for dead. The turns change at every
    name that is made, given or taken away."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    turns, told = Turns(slices), ([], [])
    owners = [replace(Owner.this(), token=token, job="1", restart=number) for number, token in enumerate(("first", "second"))]
    with pytest.MonkeyPatch.context() as patch:
        for home, name in ((Path, "rename"), (Path, "mkdir"), (Path, "replace"), (shutil, "rmtree"), (store, "sync_folder")):
            patch.setattr(home, name, _with_point(getattr(home, name), turns.point))
        turns.run(*(lambda o=owner, t=words: saving_run(run_dir, o, turns.point, t) for owner, words in zip(owners, told)))
    last = ownership.owner_of(run_dir).token
    stayed = told[[owner.token for owner in owners].index(last)]
    assert stayed == ["ended"], (last, told)
    whole = store.whole_checkpoints(store.folder_of(run_dir))
    assert whole
    for path in whole:
        state = store.read_state(path)
        assert state["iteration"] == store.iteration_of(path)
        assert [(path / store.WEIGHTS / f"__{number}_0.distcp").read_text() for number in range(2)] == [state["by"]] * 2
    iterations = [line["iteration"] for line in read_json_lines(run_dir / "log.jsonl")]
    assert iterations == list(range(1, len(iterations) + 1))


def _with_point(function: Callable[..., object], point: Callable[[], None]) -> Callable[..., object]:
    def wrapped(*arguments: object, **named: object) -> object:
        point()
        return function(*arguments, **named)

    return wrapped

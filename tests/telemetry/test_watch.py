"""The live view, drawn from files as a run leaves them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from megatron_spice.config.errors import ConfigError
from megatron_spice.telemetry import progress
from megatron_spice.telemetry.dashboard import BARS, Look, draw, sparkline
from megatron_spice.telemetry.follow import Follower, last_record
from megatron_spice.telemetry.json_lines import JsonLines
from megatron_spice.watch import watch

METRICS = Path(__file__).parents[2] / "docs/results/quickstart-50/metrics.jsonl"


def line(iteration: int, **metrics: object) -> str:
    return json.dumps({"iteration": iteration, "time": time.time(), **metrics}) + "\n"


def screen(look: Look, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    console.print(draw(look))
    return console.export_text()


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=8), st.booleans())
def test_a_follower_sees_what_a_reader_of_the_whole_file_sees(tmp_path_factory: pytest.TempPathFactory, attempts, torn: bool):
    """A run is resumed again and again, each time from an earlier iteration; the follower looks in between, or does not."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    follower, newest = Follower(path), 0
    for attempt, (resumed_from, count) in enumerate(attempts):
        resumed_from = min(resumed_from, newest)
        log = JsonLines(path, resumed_from)
        newest = resumed_from + count
        log.write([{"iteration": number, "attempt": attempt, "pad": "x" * attempt} for number in range(resumed_from + 1, newest + 1)])
        log.close()
        if torn:
            with open(path, "a") as file:
                file.write('{"iteration": 9')
        if attempt % 2:
            follower.read()
    whole = [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")]
    assert [record["iteration"] for record in follower.read()] == [record["iteration"] for record in whole]
    assert [record["attempt"] for record in follower.read()] == [record["attempt"] for record in whole]


def test_the_last_whole_record_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    assert last_record(path) is None
    path.write_text("".join(line(number, text="y" * 3000) for number in range(1000)) + '{"torn')
    assert last_record(path)["iteration"] == 999


@given(st.lists(st.one_of(st.none(), st.floats()), max_size=30))
@example([1.7976931348623157e308, -1.7976931348623157e308])
def test_a_curve_has_one_character_a_value(values: list[float | None]) -> None:
    curve = sparkline(values)
    assert len(curve) == len(values)
    assert set(curve) <= {" ", *BARS}


def test_a_curve_within_limits() -> None:
    assert sparkline([0.0, 0.5, 1.0, None, 7.0], (0.0, 1.0)) == BARS[0] + BARS[4] + BARS[7] + " " + BARS[7]


def test_a_real_run_on_one_screen() -> None:
    records = [json.loads(text) for text in METRICS.read_text().splitlines()]
    text = screen(Look("runs/x", records, records[-1]["time"] + 5, total=60, drift_alarm=0.001))
    assert "iteration 50 of 60" in text and "5 s ago" in text and "left" in text
    for word in ("pass rate", "tokens/s", "play", "train", "sync", "engines", "passages again"):
        assert word in text
    assert "!" in next(row for row in text.splitlines() if "drift" in row)


@pytest.mark.parametrize("width", [80, 200])
def test_the_newest_iterations_are_on_the_screen_however_narrow(width: int) -> None:
    """A pass rate that was 0 and is 1 in the last three iterations: its curve ends with them, in a column of as many iterations as its
    head says."""
    records = [{"iteration": number, progress.PASS_RATE: float(number > 497), progress.SPEED: 1.0} for number in range(1, 501)]
    rows = screen(Look("runs/x", records, 0.0), width).splitlines()
    assert all(len(row) <= width for row in rows)
    curve = re.search(f"[{BARS}]+", next(row for row in rows if "pass rate" in row)).group()
    assert curve.endswith(BARS[0] + BARS[-1] * 3)
    [said] = [int(found[1]) for row in rows if (found := re.search(r"last (\d+) iterations", row))]
    assert said == len(curve) > width // 3


def test_of_a_short_run_all_is_shown() -> None:
    text = screen(Look("runs/x", [{"iteration": number, progress.PASS_RATE: number / 3} for number in (1, 2, 3)], 0.0), 80)
    assert "last 3 iterations" in text and BARS[2] + BARS[5] + BARS[7] in text


def test_whose_memory_is_short_and_who_is_slow_is_on_the_screen() -> None:
    last = {
        "iteration": 1, "seconds/train": 10.0, "seconds/save": 1.0, "seconds/iteration": 11.0, "memory/most_held_gib": 40.0,
        "memory/slept_gib": 3.0, "ranks/train_min": 9.0, "ranks/train_max": 12.34, "ranks/train_max_rank": 37.0, "ranks/train_min_rank": 1.0,
        "ranks/memory/most_held_gib_min": 39.0, "ranks/memory/most_held_gib_min_rank": 8.0, "ranks/memory/most_held_gib_max": 71.5,
        "ranks/memory/most_held_gib_max_rank": 21.0, "ranks/memory/slept_gib_min": 3.0, "ranks/memory/slept_gib_max": 3.0,
        "ranks/memory/slept_gib_min_rank": 0.0, "ranks/memory/slept_gib_max_rank": 0.0,
    }  # fmt: skip
    rows = screen(Look("runs/x", [last], 0.0), 160).splitlines()
    train, held, slept = (next(row for row in rows if word in row) for word in ("train", "most held", "slept"))
    assert "slowest: 12.3 s rank 37" in train
    assert "40.00 GiB" in held and "least 39.00 rank 8" in held and "most 71.50 rank 21" in held
    assert "3.00 GiB" in slept and "rank" not in slept.partition("slept")[2], "all the same"


def test_many_engines_leave_room_for_the_task() -> None:
    """Of 128 those four are shown that have been silent for longest."""
    task = {"question": "who?", "gold_answer": "me"}
    episode = {"iteration": 1, "passage": {"text": "a"}, "attempts": [{"task": task, "is_reasoner_task": True, "answers": []}]}
    logs = [(f"engine_{number // 8}_{number % 8}", float(number * 37 % 128)) for number in range(128)]
    looks = [Look("runs/x", [{"iteration": 1}], 0.0, episode=episode, engine_logs=some) for some in (logs[:4], logs)]
    few, many = (screen(look).splitlines() for look in looks)
    assert len(many) == len(few) + 1 and any("128, the most silent" in row for row in many)
    shown = [name for row in many for name in re.findall(r"engine_\d+_\d+", row)]
    assert shown == [name for name, seconds in sorted(logs, key=lambda each: -each[1]) if seconds > 123]
    assert any("a task of iteration 1" in row for row in many)


def test_hostile_texts_stay_text() -> None:
    task = {"question": "[red]who?\x1b[2J\x07\n", "gold_answer": "[/]"}
    episode = {"iteration": 1, "passage": {"text": "a\rb"}, "attempts": [{"task": task, "is_reasoner_task": True, "answers": []}]}
    text = screen(Look("[bold]run", [{"iteration": 1}], 0.0, episode=episode))
    assert "[red]who?" in text and "[/]" in text and "[bold]run" in text
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text


def test_the_command_prints_once_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(3, **{"reasoner/pass_rate": 0.5}))
    (tmp_path / "recipe.yaml").write_text("train: {iterations: 4}\n")
    command = [sys.executable, "-m", "megatron_spice", "watch", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"})
    assert result.returncode == 0 and "iteration 3 of 4" in result.stdout


def test_on_a_terminal_the_screen_follows_the_run_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(3))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    seen = b""

    def read_until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            assert select.select([ours], [], [], 60)[0], f"{words} did not come: {seen[-2000:]}"
            seen += os.read(ours, 65536)

    watcher = subprocess.Popen(
        [sys.executable, "-m", "megatron_spice", "watch", str(tmp_path), "--interval", "0.1"], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        read_until(b"iteration 3")
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(line(4))
        read_until(b"iteration 4")
        watcher.send_signal(signal.SIGINT)
        read_until(b"\x1b[?1049l")  # the screen that was there before
        assert watcher.wait(60) == 0 and b"Traceback" not in seen
    finally:
        watcher.kill()
        watcher.wait()
        os.close(ours)
        os.close(theirs)


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        watch(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="not the metrics of a run"):
        watch(tmp_path, once=True)
    (tmp_path / "metrics.jsonl").write_text("")
    watch(tmp_path, once=True, console=(console := Console(record=True, file=open(os.devnull, "w"))))
    assert "no iteration is finished yet" in console.export_text()

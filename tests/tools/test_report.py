from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_run import made_run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def some_run(folder: Path, count: int) -> Path:
    return made_run(
        folder, count, challenger__valid_share=lambda number: 0.4 + 0.01 * number, reasoner__pass_rate=lambda number: None if number == 1 else 0.25,
        seconds__play=lambda _: 6.0, seconds__other=lambda _: 2.0, seconds__iteration=lambda _: 8.0,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 50])
def test_a_run_becomes_a_page_figures_and_a_summary(tmp_path: Path, count: int) -> None:
    run = some_run(tmp_path / "run", count)
    done = report(run, *(["--png", tmp_path / "png"] if count == 50 else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert "<title>run: SPICE run report</title>" in (run / "report.html").read_text()
    if count == 50:
        assert {path.name for path in (tmp_path / "png").iterdir()} >= {"phases.png", "challenger-valid_share.png"}
        assert "challenger/valid_share           0.455 ->     0.855" in done.stdout
        assert "6.7 minutes of iterations: play 75.0%, other 25.0%" in done.stdout


def test_several_runs_make_one_page_beside_them_and_a_sheet(tmp_path: Path) -> None:
    runs = [some_run(tmp_path / "runs" / name, 7) for name in ("a", "b")]
    assert report(*runs, runs[0]).returncode == 0
    assert "2 runs: SPICE run report" in (tmp_path / "runs" / "report.html").read_text()
    assert report(*runs, "-o", tmp_path / "out" / "sheet.png").returncode == 0
    assert (tmp_path / "out" / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_reported_is_an_error(tmp_path: Path) -> None:
    done = report(tmp_path)
    assert (done.returncode, "give the folder of a run" in done.stderr) == (2, True)
    done = report(some_run(tmp_path / "run", 2), "-o", tmp_path / "report.pdf")
    assert (done.returncode, "must end with .html or .png" in done.stderr) == (2, True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{broken\n{}\n")
    done = report(tmp_path / "run")
    assert (done.returncode, "metrics.jsonl:1" in done.stderr) == (2, True)
    assert not list(tmp_path.rglob("*report.html*"))

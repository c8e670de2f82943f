"""install.sh where it needs no network: what it refuses, and that it does nothing when there is nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)


def install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "install.sh"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        ([], {"SPICE_PYTHON": "/bin/false"}, "SPICE_PYTHON=/bin/false is not a Python 3.10, 3.11 or 3.12"),
        ([], {"SPICE_DEVICE": "tpu"}, "SPICE_DEVICE=tpu; it is cpu or cuda"),
        (["--tests"], {}, "unknown argument '--tests'"),
    ],
)
def test_what_it_cannot_do_is_said(tmp_path, arguments, environment, part):
    done = install(*arguments, SPICE_VENV=str(tmp_path / "venv"), **environment)
    assert done.returncode == 1
    assert part in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(not (VENV / ".spice-installed").exists(), reason="this environment was not made by install.sh")
def test_a_second_run_does_nothing():
    started = time.monotonic()
    done = install(SPICE_VENV=str(VENV))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 10


def test_every_requirement_is_pinned():
    """Directly, or by constraints.txt, so that an installation next year is the one that was tested."""
    folder = ROOT / "requirements"
    pinned = {_name(line) for line in _lines(folder / "constraints.txt")}
    for file in ("base.txt", "cpu.txt", "cpu-no-deps.txt", "dali-no-deps.txt", "stages.txt", "evaluation.txt", "test.txt"):
        for line in _lines(folder / file):
            assert "==" in line or _name(line) in pinned, f"{file}: {line}"


def _lines(path: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r")]


def _name(line: str) -> str:
    return line.split("=")[0].split(";")[0].strip().lower().replace("_", "-")

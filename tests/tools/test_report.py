from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, count: int) -> Path:
    records = [
        {
            "iteration": number,
            "challenger/valid_share": 0.4 + 0.01 * number,
            "reasoner/pass_rate": None if number == 1 else 0.25,
            "seconds/play": 6.0,
            "seconds/other": 2.0,
            "seconds/iteration": 8.0,
        }
        for number in range(1, count + 1)
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("count", [1, 40])
def test_a_run_becomes_a_figure_and_a_summary(
    report, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    run_dir = write_run(tmp_path / "run", count)
    assert report.main([str(run_dir), "-o", str(tmp_path / "out" / "figure.png")]) == 0
    image = imread(tmp_path / "out" / "figure.png")
    assert image.shape[0] > 1000 and image[..., :3].std() > 0.05
    printed = capsys.readouterr().out
    if count == 40:
        assert "challenger/valid_share           0.430 ->     0.780" in printed
        assert "5.3 minutes of iterations: play 75.0%, other 25.0%" in printed


def test_the_running_mean_looks_back_and_skips_gaps(report) -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0])
    assert report.running_mean(values, 2).tolist() == [1.0, 1.0, 3.0, 4.0]
    assert np.isnan(report.running_mean(np.array([math.nan]), 3)).all()


def test_a_run_without_metrics_is_an_error(report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 2
    assert "no iteration has ended yet" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("{broken\n{}\n")
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.jsonl:1" in capsys.readouterr().err

"""tools/study.py: what is left to do by what is there, sums by hand, and a study that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tools.study import jobs, main, read, summary, table, trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    recipes = {"spice": str(ROOT / "examples/quickstart.yaml"), "threshold": str(ROOT / "examples/ablations/threshold-reward.yaml")}
    path.write_text(yaml.safe_dump({
        "output": str(tmp_path / "out"), "seeds": [0, 1], "recipes": recipes, "overrides": ["train.iterations=20"],
        "evaluate": ["--tasks", "factbook"], "crossplay": ["--passages", "4"],
    }))  # fmt: skip
    return path


def _finish(run, rate: float, score: float) -> None:
    """What a run, its evaluation and its match would leave behind."""
    run.checkpoint(run.iterations).mkdir(parents=True)
    lines = [{"iteration": number, "reasoner/pass_rate": rate if number > 18 else 0.0} for number in range(1, 21)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "results.json").write_text(json.dumps({"tasks": [{"task": "factbook", "mean": score}]}))
    (run.folder / "crossplay").mkdir()
    pair = {"challenger": "late", "reasoner": "early", "pass_rate": rate}
    (run.folder / "crossplay" / "matrix.json").write_text(json.dumps({"pairs": [pair, {**pair, "reasoner": "late", "pass_rate": None}]}))


def test_the_example_is_nine_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["examples/studies/components.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("spice.sh" in line for line in lines) == sum("crossplay.py" in line for line in lines) == 9
    assert sum("evaluate.py" in line and "checkpoints" in line for line in lines) == 9


def test_what_is_there_is_not_done_again(study, capsys):
    assert main([str(study), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 4, "train, evaluate before and after, and a match, for two recipes and two seeds"
    assert "run.dir" in lines[0] and "train.seed=0" in lines[0] and "checkpoint.keep=6" in lines[0] and "train.iterations=20" in lines[0]
    runs = list(trained(read(study)))
    assert [(run.name, run.seed) for run in runs] == [("spice", 0), ("threshold", 0), ("spice", 1), ("threshold", 1)]
    _finish(runs[0], 0.5, 0.2)
    left = [job.command for job in jobs(read(study), runs)]
    assert not [command for command in left if str(runs[0].checkpoint(20)) in command or f"run.dir={runs[0].folder}" in command]
    assert len(left) == 16 - 3


def test_sums_are_of_seeds_and_differences_of_pairs(study):
    runs, told = list(trained(read(study))), read(study)
    for run, rate, score in zip(runs, (0.2, 0.6, 0.4, 0.6), (0.3, 0.3, 0.5, 0.3)):
        _finish(run, rate, score)
    before = told.output / "before" / str(runs[0].model).replace("/", "-")
    before.mkdir(parents=True)
    (before / "results.json").write_text(json.dumps({"tasks": [{"task": "factbook", "mean": 0.25}]}))
    found = summary(told, runs)
    rates = found["quantities"]["reasoner/pass_rate"]
    assert rates["spice"]["by_seed"] == {0: 0.2, 1: 0.4} and rates["spice"]["mean"] == pytest.approx(0.3)
    assert rates["threshold"]["difference"]["mean"] == pytest.approx(0.3)
    assert (rates["threshold"]["difference"]["low"], rates["threshold"]["difference"]["high"]) == pytest.approx((0.2, 0.4))
    assert found["quantities"]["evaluation/factbook less before"]["spice"]["by_seed"] == pytest.approx({0: 0.05, 1: 0.25})
    assert found["quantities"]["crossplay/late Challenger, early Reasoner"]["spice"]["seeds"] == 2
    assert "less spice: +0.3000 [+0.2000, +0.4000]" in table(found)


@pytest.mark.parametrize(("change", "words"), [
    ({"seeds": []}, ["seeds"]),
    ({"recipe": {}}, ["recipe"]),
    ({"overrides": ["train.iteration=3"]}, ["train.iteration", "(spice)"]),
    ({"recipes": {"x": "nowhere.yaml"}}, ["nowhere.yaml"]),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused_before_anything_starts(study, capsys, change, words):
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    assert main([str(study)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said

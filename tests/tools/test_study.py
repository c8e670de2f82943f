"""tools/study.py: what is left to do by what is there, sums by hand, and a study that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_spice.config.describe import resolved
from megatron_spice.config.loader import load_config
from megatron_spice.report.runs import read_run
from tools import study as tool
from tools.study import Trained, jobs, main, read, trained
from tools.study_summary import Outcome, summary, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch) -> Path:
    """What the recipes name, in the folder that the tests are in."""
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-megatron", "factbook", "factbook-training"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    (tmp_path / "assets" / "smollm2-135m-megatron" / "config.json").write_text("{}")
    return tmp_path / "assets"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    recipes = {"spice": str(ROOT / "examples/quickstart.yaml"), "threshold": str(ROOT / "examples/ablations/threshold-reward.yaml")}
    path.write_text(yaml.safe_dump({
        "output": str(tmp_path / "out"), "seeds": [0, 1], "recipes": recipes, "overrides": ["train.iterations=20"],
        "evaluate": ["--tasks", "factbook"], "crossplay": ["--passages", "4"],
    }))  # fmt: skip
    return path


def _finish(told: tool.Study, run: Trained, rate: float, score: float) -> None:
    """What a run, its evaluation and its match would leave behind."""
    _note(told, run)
    run.checkpoint(run.iterations).mkdir(parents=True)
    lines = [{"iteration": number, "reasoner/pass_rate": rate if number > 18 else 0.0} for number in range(1, 21)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _answer(run.evaluation, score)
    pair = {"challenger": "late", "reasoner": "early", "pass_rate": rate}
    (run.crossplay / "matrix.json").write_text(json.dumps({"pairs": [pair, {**pair, "reasoner": "late", "pass_rate": None}]}))


def _answer(folder: Path, score: float) -> None:
    """The results of ten questions, of which the first ones are right."""
    (folder / "results.json").write_text(json.dumps({"tasks": [{"task": "factbook", "mean": score, "log": "factbook.jsonl"}]}))
    lines = [{"id": str(item), "answers": [{"correct": item < 10 * score}]} for item in range(10)]
    (folder / "factbook.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ({"task": "factbook"}, *lines)))


def _note(told: tool.Study, run: Trained) -> None:
    """What `main` notes after a run's own evaluation and match, which leave nothing."""
    for job in jobs(told, [run]):
        if job.done.is_relative_to(run.folder) and job.asked:
            job.done.parent.mkdir(parents=True)
            job.note()


def test_the_example_is_nine_runs(capsys, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert main(["examples/studies/components.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("spice.sh" in line for line in lines) == 9
    assert sum("crossplay.py" in line and "spice-seed" in line for line in lines) == sum("crossplay.py" in line for line in lines) == 3
    assert sum("evaluate.py" in line and "checkpoints" in line for line in lines) == 9


def test_what_is_there_is_not_done_again(study, capsys):
    assert main([str(study), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 4, "train, evaluate before and after, and a match, for two recipes and two seeds"
    assert "run.dir" in lines[0] and "train.seed=0" in lines[0] and "checkpoint.keep=6" in lines[0] and "train.iterations=20" in lines[0]
    runs = list(trained(read(study)))
    assert [(run.name, run.seed) for run in runs] == [("spice", 0), ("threshold", 0), ("spice", 1), ("threshold", 1)]
    _finish(read(study), runs[0], 0.5, 0.2)
    left = [job.command for job in jobs(read(study), runs)]
    assert not [command for command in left if str(runs[0].checkpoint(20)) in command or f"run.dir={runs[0].folder}" in command]
    assert len(left) == 16 - 3


def test_what_is_missing_is_said_before_anything_starts(study, assets, capsys, monkeypatch):
    """In a dry run after what is to be done; of runs that are trained already nothing has to be there any more."""
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    (assets / "factbook").rmdir()
    (assets / "smollm2-135m-megatron" / "config.json").unlink()
    for options in (["--dry-run"], []):
        assert main([str(study), *options]) == 2
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == (16 if options else 0)
        first, second = said.err.splitlines()[1:]
        assert first.startswith("  spice, threshold: corpus.path=assets/factbook is not there")
        assert second.startswith("  spice, threshold: policy.model=assets/smollm2-135m-megatron holds neither")
    for run in trained(read(study)):
        _finish(read(study), run, 0.5, 0.2)
    assert main([str(study), "--dry-run"]) == 0 and capsys.readouterr().err == ""


def test_sums_are_of_seeds_and_differences_of_pairs(study):
    runs, told = list(trained(read(study))), read(study)
    for run, rate, score in zip(runs, (0.2, 0.6, 0.4, 0.6), (0.3, 0.3, 0.5, 0.3)):
        _finish(told, run, rate, score)
    before = told.output / "before" / f"{str(runs[0].model).replace('/', '-')}-few_shot-12"
    before.mkdir(parents=True)
    _answer(before, 0.2)
    found = summary([Outcome(run, before) for run in runs])
    rates = found["quantities"]["reasoner/pass_rate"]
    assert rates["spice"]["by_seed"] == {0: 0.2, 1: 0.4} and rates["spice"]["mean"] == pytest.approx(0.3)
    assert rates["threshold"]["difference"]["mean"] == pytest.approx(0.3)
    # Differences of 0.4 and 0.2: Student's 12.7062 with one degree of freedom, times their error of 0.1.
    low, high = (rates["threshold"]["difference"][end] for end in ("low", "high"))
    assert (low, high) == pytest.approx((0.3 - 1.27062, 0.3 + 1.27062), rel=1e-3)
    assert found["quantities"]["evaluation/factbook less before"]["spice"]["by_seed"] == pytest.approx({0: 0.1, 1: 0.3})
    assert found["quantities"]["crossplay/late Challenger, early Reasoner"]["spice"]["seeds"] == 2
    assert "less spice: +0.3000 [-0.9706, +1.5706]" in table(found)
    changes = found["changes"]["factbook"]
    assert changes["spice"]["since_before"]["mean"] == pytest.approx(0.2) and "from_first" not in changes["spice"]
    assert changes["threshold"]["from_first"]["mean"] == pytest.approx(-0.1)
    assert (changes["threshold"]["from_first"]["runs"], changes["threshold"]["from_first"]["items"]) == (2, 10)
    assert "less spice               -0.1000 [" in table(found)


def test_one_seed_has_no_interval_but_its_questions_have(study):
    runs, told = list(trained(read(study)))[:2], read(study)
    for run, score in zip(runs, (0.3, 0.5)):
        _finish(told, run, 0.2, score)
    found = summary([Outcome(run, told.output / "before") for run in runs])
    rates = found["quantities"]["reasoner/pass_rate"]
    assert (rates["spice"]["low"], rates["spice"]["high"], rates["threshold"]["difference"]["low"]) == (None, None, None)
    change = found["changes"]["factbook"]["threshold"]["from_first"]
    assert change["low"] < change["mean"] < change["high"]
    text = table(found)
    assert "0.2000 [no interval] over 1 seed(s); less spice: +0.0000 [no interval]" in text
    assert "] over 10 questions of one seed" in text


def test_a_runs_report_finds_what_the_study_evaluated_before_training(study):
    told = read(study)
    for run in trained(told):
        _finish(told, run, 0.5, 0.6)
        (run.folder / "recipe.yaml").write_text(resolved(load_config(run.arguments[0], run.arguments[1:])))
        [before, *_] = (job.done.parent for job in jobs(told, [run]) if job.done.name == "results.json")
        before.mkdir(parents=True, exist_ok=True)
        _answer(before, 0.2)
        scores = read_run(run.folder).scores
        assert [(score.iteration, score.score) for score in scores] == [(0, 0.2), (20, 0.6)]


@pytest.mark.parametrize(("change", "left"), [
    ({"overrides": ["train.iterations=30"]}, ["train", "evaluate 30", "match 30"]),
    ({"evaluate": ["--tasks", "factbook,gsm8k"]}, ["evaluate before", "evaluate 20"]),
    ({"crossplay": ["--passages", "8"]}, ["match 20"]),
    ({"overrides": ["train.iterations=20", "game.group_size=4"]}, ["match 20"]),
])  # fmt: skip
def test_a_longer_run_or_other_tasks_leave_something_to_do(study, change, left):
    told = read(study)
    [run, *_] = trained(told)
    _finish(told, run, 0.5, 0.2)
    (run.folder / "recipe.yaml").write_text(resolved(load_config(run.arguments[0], run.arguments[1:])))
    [before] = jobs(told, [run])
    before.done.parent.mkdir(parents=True)
    before.done.write_text("{}")
    before.note()
    assert not list(jobs(told, [run]))
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    told = read(study)
    [run, *_] = trained(told)
    assert [_called(job) for job in jobs(told, [run])] == left


def _called(job: tool.Job) -> str:
    place = job.done.parent
    if job.done.name == "results.json":
        assert job.command[job.command.index("--output") + 1] == str(place)
        return "evaluate before" if place.parent.name == "before" else f"evaluate {place.name.removeprefix('iteration_')}"
    return f"match {place.name.removeprefix('crossplay-')}" if job.done.name == "matrix.json" else "train"


def test_models_are_asked_as_the_run_was_and_the_first_one_anew_where_that_differs(study):
    told = read(study)
    places = []
    for overrides in ([], ["game.reasoner_max_tokens=48"], ["game.prompt_style=chat"]):
        told.overrides = ["train.iterations=20", *overrides]
        [run, *_] = trained(told)
        asked = [job for job in jobs(told, [run]) if job.done.name == "results.json"]
        assert [job.command[job.command.index("--recipe") + 1] for job in asked] == [str(run.folder / "recipe.yaml")] * 2
        places.append(asked[0].done.parent.name.rpartition("megatron")[2])
    assert places == ["-few_shot-12", "-few_shot-48", "-chat-12"]


def test_the_arguments_are_noted_once_a_job_is_done(study, monkeypatch):
    """`true` and `false` stand for the commands."""
    monkeypatch.setattr(tool, "summary", lambda *_: {"quantities": {}, "changes": {}, "compared_with": "spice"})
    (study.parent / "out").mkdir()
    for command, code in (("false", 1), ("true", 0)):
        job = tool.Job([command], study.parent / command / "results.json", ["--tasks", "a b"])
        monkeypatch.setattr(tool, "jobs", lambda *_, job=job: iter([job]))
        assert main([str(study)]) == code
    assert not (study.parent / "false" / "asked.txt").exists()
    assert (study.parent / "true" / "asked.txt").read_text() == "--tasks 'a b'\n"


@pytest.mark.parametrize(("change", "words"), [
    ({"seeds": []}, ["seeds"]),
    ({"recipe": {}}, ["recipe"]),
    ({"crossplay_of": ["spyce"]}, ["crossplay_of", "spyce", "spice, threshold"]),
    ({"overrides": ["train.iteration=3"]}, ["train.iteration", "(spice)"]),
    ({"recipes": {"x": "nowhere.yaml"}}, ["nowhere.yaml"]),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused_before_anything_starts(study, capsys, change, words):
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    assert main([str(study)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said

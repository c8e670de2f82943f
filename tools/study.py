#!/usr/bin/env python3
"""Recipes x seeds as one command: trains each, evaluates before and after, lets early and late checkpoints meet, and sums up.

    python tools/study.py examples/studies/components.yaml            # the same command goes on where it was interrupted
    python tools/study.py examples/studies/components.yaml --dry-run  # what is still to be done, and what is missing for it

A study is YAML: `output` (folder), `seeds`, `recipes` (name: path), and if wanted `overrides` (for all runs), `evaluate` (arguments of
tools/evaluate.py after the model, such as ["--tasks", "factbook"]) and `crossplay` (arguments of tools/crossplay.py after the
reasoners, such as ["--passages", "64"]), of all recipes or of those in `crossplay_of`. Jobs run one after the other; one that fails ends the study with its exit code. A run that is
to be longer, or other tasks, are done on top of what is there: evaluations and matches are of an iteration, and asked.txt beside
their results holds the arguments that they were made with. OUTPUT gets summary.json and summary.txt (`study_summary.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator  # noqa: E402

from megatron_spice.checkpoint import store  # noqa: E402
from megatron_spice.config.checks import check_paths  # noqa: E402
from megatron_spice.config.errors import ConfigError  # noqa: E402
from megatron_spice.config.hf import hugging_face_folder  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.curriculum.rows import RECIPE_NAME  # noqa: E402
from megatron_spice.report.runs import before_folder  # noqa: E402
from tools.study_summary import Outcome, summary, table  # noqa: E402

ASKED = "asked.txt"


class Study(BaseModel):
    """What is studied."""

    model_config = ConfigDict(extra="forbid")

    output: Path
    seeds: list[int] = Field(min_length=1)
    recipes: dict[str, Path] = Field(min_length=1)
    overrides: list[str] = []
    evaluate: list[str] = []
    crossplay: list[str] = []
    crossplay_of: list[str] = []

    @model_validator(mode="after")
    def _known(self) -> Study:
        if unknown := set(self.crossplay_of) - set(self.recipes):
            raise ValueError(f"crossplay_of: {', '.join(sorted(unknown))} not among recipes: {', '.join(self.recipes)}")
        return self

    def plays(self, name: str) -> bool:
        """Whether a recipe's checkpoints are set against each other."""
        return bool(self.crossplay) and name in (self.crossplay_of or self.recipes)


class Job(NamedTuple):
    """A command, the file whose being there says that it is done, and the study's arguments that this file has to be made with."""

    command: list[str]
    done: Path
    asked: list[str] = []

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        path = self.done.with_name(ASKED)
        return self.done.exists() and (not self.asked or (path.exists() and path.read_text() == _line(self.asked)))

    def note(self) -> None:
        """Keeps with which arguments it was done."""
        if self.asked:
            self.done.with_name(ASKED).write_text(_line(self.asked))


def _line(arguments: Sequence[str]) -> str:
    return shlex.join(arguments) + "\n"


class Trained(NamedTuple):
    """One recipe with one seed."""

    name: str
    seed: int
    folder: Path
    arguments: list[str]
    model: Path
    iterations: int

    def checkpoint(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration is."""
        return store.folder_of(self.folder) / store.name_of(iteration)

    @property
    def evaluation(self) -> Path:
        """Where the results of the last iteration are."""
        return self.folder / "evaluation" / f"iteration_{self.iterations}"

    @property
    def crossplay(self) -> Path:
        """Where the match up to the last iteration is."""
        return self.folder / f"crossplay-{self.iterations}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is left of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left")
    options = parser.parse_args(arguments)
    try:
        study = read(options.study)
        runs = list(trained(study))
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    missing = lacks(study, runs)
    if missing and not options.dry_run:  # later runs' too, before the first has taken its hours
        print("\n  ".join(["study:", *missing]), file=sys.stderr)
        return 2
    for job in jobs(study, runs, options.dry_run):
        print(shlex.join(job.command), flush=True)
        if options.dry_run:
            continue
        job.done.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"SPICE_VENV": os.environ.get("SPICE_VENV", sys.prefix)}
        code = subprocess.run(job.command, cwd=ROOT, env=environment, check=False).returncode
        if code:
            print(f"study: exit code {code}; the same command goes on from here", file=sys.stderr)
            return code
        job.note()
    if missing:
        print("\n  ".join(["study:", *missing]), file=sys.stderr)
        return 2
    if not options.dry_run:
        found = summary([Outcome(run, _before(study, run)) for run in runs])
        (study.output / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
        (study.output / "summary.txt").write_text(text := table(found))
        print(text, end="")
    return 0


def read(path: Path) -> Study:
    """The study in a file.

    Raises:
        ValueError: it is none; the message names the key.
    """
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{path}: {problems}") from None


def trained(study: Study) -> Iterator[Trained]:
    """Every recipe with every seed, read and checked as far as can be told before anything starts.

    Raises:
        ConfigError: a recipe is wrong.
    """
    for seed in study.seeds:  # seed by seed, so that what is there first can be compared
        for name, recipe in study.recipes.items():
            folder = study.output.resolve() / f"{name}-seed{seed}"
            own = [*study.overrides, f"run.dir={folder}", f"train.seed={seed}"]
            try:
                config = load_config(recipe, own)
            except ConfigError as error:
                raise ConfigError(error.problems, f"{recipe} ({name})") from None
            kept = [f"checkpoint.keep={max(config.checkpoint.keep, 1 + config.train.iterations // config.checkpoint.every)}"]
            arguments = [str(recipe), *own, *(kept if study.plays(name) else [])]
            yield Trained(name, seed, folder, arguments, config.policy.model, config.train.iterations)


def lacks(study: Study, runs: Sequence[Trained]) -> list[str]:
    """What is not where the recipes of the runs that are still to be trained say: models, corpora, packages; each once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.checkpoint(run.iterations).exists():
            continue
        config = load_config(run.arguments[0], run.arguments[1:])
        problems = check_paths(config)
        try:
            hugging_face_folder(config.policy.model)
        except ConfigError as error:
            problems += error.problems
        for problem in problems:
            found.setdefault(problem, []).append(run.name)
    return [f"{', '.join(dict.fromkeys(names))}: {problem}" for problem, names in found.items()]


def jobs(study: Study, runs: Sequence[Trained], dry_run: bool = False) -> Iterator[Job]:
    """What is left to do, in order; asked for one by one, since later ones look at what earlier ones have made."""
    tools = [sys.executable, str(ROOT / "tools")]
    for run in runs:
        job = Job(["bash", str(ROOT / "slurm" / "spice.sh"), *run.arguments], run.checkpoint(run.iterations))
        if not job.is_done:
            yield job
        if study.evaluate:
            recipe = str(run.folder / RECIPE_NAME)  # with the overrides, as training took it
            for model, folder in ((run.model, _before(study, run)), (run.checkpoint(run.iterations), run.evaluation)):
                command = [tools[0], f"{tools[1]}/evaluate.py", "run", str(model), "--recipe", recipe, *study.evaluate]
                job = Job([*command, "--output", str(folder)], folder / "results.json", study.evaluate)
                if not job.is_done:
                    yield job
        if study.plays(run.name):
            saved = store.whole_checkpoints(store.folder_of(run.folder)) or [run.checkpoint(0)]
            models = f"early={saved[0]},late={run.checkpoint(run.iterations)}"
            command = [tools[0], f"{tools[1]}/crossplay.py", run.arguments[0], str(run.crossplay), "--challengers", models]
            asked = [*study.crossplay, *study.overrides]
            job = Job([*command, "--reasoners", models, *asked], run.crossplay / "matrix.json", asked)
            if not job.is_done:
                yield job


def _before(study: Study, run: Trained) -> Path:
    """Where the results of the model before training are."""
    resolved = run.folder / RECIPE_NAME
    game = (load_config(resolved) if resolved.exists() else load_config(run.arguments[0], run.arguments[1:])).game
    return before_folder(study.output, run.model, game.prompt_style, game.reasoner_max_tokens)


if __name__ == "__main__":
    sys.exit(main())

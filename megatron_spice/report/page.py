"""The report: one HTML file that holds everything it needs, and asks no other for anything.

Its content security policy allows the one script it was made with, by its hash, and no connection at all: should a text of
a model ever get past the escaping, it could still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_spice.report import answers, catalogue
from megatron_spice.report.change import change_over_seeds, end_of
from megatron_spice.report.compare import compare
from megatron_spice.report.crossplay import read_matrices
from megatron_spice.report.drawing import Drawing, draw, sparkline
from megatron_spice.report.episode_file import EpisodeFile, scan
from megatron_spice.report.figure import Figure
from megatron_spice.report.groups import Group, differences, group_runs
from megatron_spice.report.payload import Payload, pack_episodes
from megatron_spice.report.ranks import Ranks, ranks_of
from megatron_spice.report.runs import Run, setting
from megatron_spice.report.text import visible
from megatron_spice.report.words import duration, number, plural
from megatron_spice.telemetry import progress

HERE = Path(__file__).parent
MOST_READ = 25  # iterations at either end whose episodes are read whole
EPISODE_BYTES = 3_500_000  # of all runs together
SHOWN_SETTINGS = (
    "policy.model", "corpus.path", "train.seed", "train.passages", "game.prompt_style", "game.answer_types", "game.group_size",
    "game.challenger_reward", "game.fixed_challenger", "game.no_corpus", "policy.learning_rate", "policy.precision",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the page with figures; `key` is its anchor."""

    key: str
    title: str
    figures: Sequence[Drawing]


def figures_by_section(groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """All figures of a report, by the key of their section; for the page and for PNG files."""
    return {
        "challenger": catalogue.curves("challenger", groups),
        "reasoner": [*catalogue.curves("reasoner", groups), *catalogue.pass_rates(groups)],
        "questions": [*catalogue.validity(groups), *catalogue.kinds(groups), *catalogue.verdicts(groups)],
        "time": [*catalogue.phases(groups), *catalogue.curves("time", groups)],
        "evaluation": catalogue.evaluations(groups),
        "audit": catalogue.curves("audit", groups),
        "lengths": catalogue.curves("lengths", groups),
        "learning": catalogue.curves("learning", groups),
        "drift": catalogue.curves("drift", groups),
        "engines": catalogue.curves("engines", groups),
    }


def page(runs: Sequence[Run], episode_bytes: int = EPISODE_BYTES) -> str:
    """The HTML of a report on one run or several.

    Args:
        episode_bytes: what all runs' episodes together may take of it.
    """
    groups = group_runs(runs)
    figures = {key: [draw(figure) for figure in found] for key, found in figures_by_section(groups).items()}
    files = [_scan(run) for run in runs]
    by_run = dict(zip((id(run) for run in runs), files))
    firsts = [by_run[id(group.runs[0])] for group in groups]
    per_run = episode_bytes // max(sum(file is not None for file in files), 1)
    payloads = [(run.name, pack_episodes(file, per_run)) for run, file in zip(runs, files) if file is not None]
    ranks = [found for run in runs if (found := ranks_of(run)) is not None]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        overview=_overview(runs),
        runs=runs,
        groups=list(zip(groups, catalogue.group_colours(groups))),
        notices=_notices(runs, files, ranks),
        ranks=ranks,
        settings=_settings(runs),
        questions=_questions(groups, firsts, figures),
        windows=_windows(groups, firsts),
        sections=_sections(figures),
        comparison=compare(groups) if len(groups) > 1 else [],
        matrices=[found for run in runs for found in read_matrices(run.folder, run.name)],
        numbers=_numbers(groups),
        payloads=payloads,
        kept=_kept([payload for _, payload in payloads]),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


def _scan(run: Run) -> EpisodeFile | None:
    numbers = run.iterations.tolist()
    count = min(end_of(len(numbers)), MOST_READ)
    early, late = (numbers[:count], numbers[-count:]) if len(numbers) > 1 else ([], numbers)
    return scan(run.episodes_path, early, late)


def _overview(runs: Sequence[Run]) -> list[str]:
    counts = [len(run.records) for run in runs]
    span = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    parts = [f"{span} {'iteration' if max(counts) == 1 else 'iterations'}" + (" each" if len(runs) > 1 else "")]
    seconds = sum(float(np.nansum(run.series(progress.WHOLE))) for run in runs)
    if seconds:
        parts.append(duration(seconds))
    passages = sum(float(np.nansum(run.series("game/passages"))) for run in runs)
    if passages:
        parts.append(plural(int(passages), "passage") + " played")
    return parts


def _notices(runs: Sequence[Run], files: Sequence[EpisodeFile | None], ranks: Sequence[Ranks]) -> list[str]:
    told = [(each.run, f"A rank failed; {line}.") for each in ranks for line in each.told.splitlines()]
    found = [f"{name}: {line}" if len(runs) > 1 else line for name, line in told]
    for run, file in zip(runs, files):
        said = list(run.notices)
        if file is not None and file.broken:
            said.append(f"{plural(file.broken, 'line')} of {run.episodes_path.name} cannot be read and was left out.")
        alarm = run.recipe.get("rollout.drift_alarm")
        above = run.iterations[run.series(progress.DRIFT[0]) > alarm] if isinstance(alarm, (int, float)) else ()
        if len(above):
            said.append(f"The mean drift was above {alarm} (rollout.drift_alarm) in {plural(len(above), 'iteration')}, the last time in {above[-1]}.")
        found += [f"{run.name}: {notice}" if len(runs) > 1 else notice for notice in said]
    return found


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Of one run the settings that matter most; of several those that differ. A row a setting, a value a run."""
    keys = [key for key in SHOWN_SETTINGS if key in runs[0].recipe] if len(runs) == 1 else differences(runs)
    return [(key, [setting(run.recipe[key]) if key in run.recipe else "-" for run in runs]) for key in keys]


def _questions(groups: Sequence[Group], files: Sequence[EpisodeFile | None], figures: dict[str, list[Drawing]]) -> list[dict]:
    windows = [(file.early, file.late) if file else (None, None) for file in files]
    asked = (
        ("challenger", "Is the Challenger getting better?",
         [answers.challenger(group, early, late) for group, (early, late) in zip(groups, windows)]),
        ("reasoner", "Is the Reasoner getting better?",
         [answers.reasoner(group, early, late) for group, (early, late) in zip(groups, windows)]),
        ("questions", "What do its questions look like?", [answers.questions(group, file) for group, file in zip(groups, files)]),
        ("time", "Where does the time go?", [answers.where_time_goes(group) for group in groups]),
    )  # fmt: skip
    return [{"key": key, "title": title, "answers": found, "figures": figures[key]} for key, title, found in asked]


def _windows(groups: Sequence[Group], files: Sequence[EpisodeFile | None]) -> list[dict]:
    """Examples of tasks, early and late, of each group's first run."""
    found = []
    for group, file in zip(groups, files):
        for window in (file.early, file.late) if file else ():
            if window.examples:
                before = f"{group.runs[0].name}, " if len(groups) > 1 else ""
                found.append({"title": before + window.span, "tasks": window.examples})
    return found


def _sections(figures: dict[str, list[Drawing]]) -> list[Section]:
    titles = {
        "evaluation": "Evaluation", "audit": "Audit of tasks", "lengths": "Lengths", "learning": "Learning", "drift": "Drift", "engines": "Engines and memory",
    }  # fmt: skip
    return [Section(key, title, figures[key]) for key, title in titles.items() if figures[key]]


def _numbers(groups: Sequence[Group]) -> list[dict]:
    """Every number that was recorded: how it ran, where it began and ended, by group."""
    iterations = catalogue.iterations_of(groups)
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics())
    rows = []
    for name in names:
        cells = []
        for group, colour in zip(groups, catalogue.group_colours(groups)):
            values = group.mean(name, iterations)
            found = change_over_seeds(group.series(name, iterations))
            known = values[np.isfinite(values)]
            cells.append({
                "line": sparkline(values), "colour": colour or "neutral",
                "first": number(found.first) if found else number(float(known[0])) if len(known) else "-",
                "last": number(found.last) if found else number(float(known[-1])) if len(known) else "-",
                "change": f"{number(found.low)} to {number(found.high)}" if found and np.isfinite(found.low) else "-",
                "clear": bool(found and found.direction),
            })  # fmt: skip
        rows.append({"name": name, "cells": cells})
    return rows


def _kept(payloads: Sequence[Payload]) -> tuple[int, int]:
    return sum(payload.episodes for payload in payloads), sum(payload.of for payload in payloads)

"""The page as text: whole, free of anything external, and safe whatever the model wrote."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_run import REAL, hostile_run, made_run

from megatron_spice.report import catalogue
from megatron_spice.report.drawing import MOST_COLUMNS, draw, ticks
from megatron_spice.report.figure import Curves, Heat, Stack
from megatron_spice.report.groups import group_runs
from megatron_spice.report.page import figures_by_section, page
from megatron_spice.report.png import save_figures
from megatron_spice.report.runs import read_run
from megatron_spice.telemetry import rank_log


class Elements(HTMLParser):
    """All elements and attributes of a page, and whether it closes what it opens."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def assert_nothing_external(elements: Elements) -> None:
    for tag, attributes in elements.found:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form[action]"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "poster", "srcset"):
                assert value.startswith(("#", "data:,")), (tag, name, value)


@pytest.mark.parametrize("kind", ["hostile", "real", "one iteration", "nothing but numbers"])
def test_a_page_is_whole_and_asks_for_nothing(tmp_path: Path, kind: str) -> None:
    folders = {
        "hostile": lambda: hostile_run(tmp_path / "<script>alert(1)<"), "real": lambda: REAL,
        "one iteration": lambda: made_run(tmp_path / "one", 1, reasoner__pass_rate=lambda _: None, x=lambda _: 1.0),
        "nothing but numbers": lambda: made_run(tmp_path / "bare", 7),
    }  # fmt: skip
    text = page([read_run(folders[kind]())])
    elements = Elements(text)
    assert not elements.open and elements.text.count("?") >= 4
    assert_nothing_external(elements)
    scripts = [attributes for tag, attributes in elements.found if tag == "script" and attributes.get("type") != "application/octet-stream"]
    assert len(scripts) == 1
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)


def test_a_newcomer_finds_four_answers_at_the_top() -> None:
    """What is known of the run of 50 iterations: the roles agree on "1" in the end [docs/results/quickstart-50/README.md]."""
    text = Elements(page([read_run(REAL)])).text
    said = [
        "Is the Challenger getting better?", "It earns more, but one answer has taken over", "Its mean reward rose from \u22120.004 to 0.32",
        "Is the Reasoner getting better?", "It passes more tasks; whether it reasons better cannot be told", "rose from 2.8\u00a0% to 51\u00a0%",
        "What do its questions look like?", "Mostly \u201chow many \u2026?\u201d", "The commonest gold answer, \u201c1\u201d, is that of 84\u00a0% of the tasks in iteration 50",
        "Where does the time go?", "Mostly into train: 46\u00a0%", "An iteration took 23.6 s", "0.01\u00a0% of it outside all phases", "Lengths",
    ]  # fmt: skip
    place = text.rindex("Every number", 0, text.index(said[0]))  # behind the links
    for words in said:
        assert words in text[place:], words
        place = text.index(words, place)


def test_a_page_is_the_same_each_time(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "run")
    assert page([read_run(folder)]) == page([read_run(folder)])


def test_runs_of_different_recipes_are_laid_over_each_other(tmp_path: Path) -> None:
    recipes = [{"train": {"seed": seed}, "game": {"no_corpus": no}} for no in (False, True) for seed in (0, 1)]
    folders = [
        made_run(tmp_path / f"{'bare' if recipe['game']['no_corpus'] else 'full'}-{recipe['train']['seed']}", 8 + place, recipe,
                 challenger__reward=lambda number, place=place: number / 10 + place, seconds__play=lambda _, place=place: 1.0 + place)
        for place, recipe in enumerate(recipes)
    ]  # fmt: skip
    runs = [read_run(folder) for folder in folders]
    text = Elements(page(runs)).text
    for said in ("4 runs", "full", "bare", "2 seeds: full-0, full-1", "The runs compared", "Settings in which the runs differ", "game.no_corpus"):
        assert said in text
    figures = figures_by_section(group_runs(runs))
    reward = figures["challenger"][0]
    assert isinstance(reward, Curves) and [len(line.faint) for line in reward.lines] == [2, 2]
    assert len(reward.iterations) == 11 and np.isfinite(reward.lines[0].values).sum() == 9
    heights = {figure.top for figure in figures["time"] if isinstance(figure, Stack)}
    assert heights == {4.0}  # the same axis for both


def test_drift_above_the_recipes_alarm_is_said(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 6, {"rollout": {"drift_alarm": 0.2}}, drift__mean=lambda number: 0.3 if number in (2, 4) else 0.1)
    text = Elements(page([read_run(run)])).text
    assert "The mean drift was above 0.2 (rollout.drift_alarm) in 2 iterations, the last time in 4." in text


def test_figures_as_png_are_those_of_the_page(tmp_path: Path) -> None:
    from matplotlib.image import imread

    figures = [figure for found in figures_by_section(group_runs([read_run(REAL)])).values() for figure in found]
    one_of_each = list({type(figure): figure for figure in figures}.values())
    paths = save_figures(one_of_each, tmp_path / "new" / "png")
    text = page([read_run(REAL)])
    for path in paths:
        assert imread(path)[..., :3].std() > 0.03
        assert f'id="figure-{path.stem}"' in text


def test_the_numbers_behind_a_figure_are_the_runs() -> None:
    run = read_run(REAL)
    figures = figures_by_section(group_runs([run]))
    rate = draw(figures["reasoner"][0])
    assert rate.table[0] == ["iteration", "quickstart-50"] and len(rate.table[1]) == 50
    assert rate.table[1][-1] == ["50", "0.902"] and rate.data["y"][0][-1] == 0.9023
    (heat,) = [figure for figure in figures["reasoner"] if isinstance(figure, Heat)]
    assert heat.rows[0] == "0 of 8" and np.allclose(np.nansum(heat.shares, axis=0), 1)
    (validity,) = catalogue.validity(group_runs([run]))
    assert np.allclose(sum(values for _, values, _ in validity.layers), 1)


def test_a_long_run_is_drawn_in_columns_that_can_be_seen(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 1000, seconds__play=lambda number: float(number), challenger__reward=lambda number: number / 1000)
    figures = figures_by_section(group_runs([read_run(run)]))
    stack = draw(figures["time"][0])
    assert len(stack.data["x"]) == MOST_COLUMNS and stack.data["y"][0][0] == 5.0  # mean of 1 to 9
    assert len(draw(figures["challenger"][0]).table[1]) == 60


@pytest.mark.parametrize(("low", "high", "known"), [(0, 1, [0, 0.5, 1]), (0, 50, [0, 20, 40]), (-0.03, 0.02, [-0.02, 0, 0.02]), (3, 3, [3]), (1e-9, 4e-9, [1e-9, 2e-9, 3e-9, 4e-9])])
def test_ticks_are_round(low: float, high: float, known: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(known)


def test_who_failed_first_is_said_with_its_last_words(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 3)
    for rank in range(100):
        path = rank_log.path_of(run, rank)
        path.parent.mkdir(exist_ok=True)
        rank_log.mark(path, rank_log.BEGAN, f"rank {rank} of 100 on node{rank // 8}, process {rank}, job 7 restart 0")
        with open(path, "a") as file:
            file.write("all is well\n<b>not so well</b>\n" if rank == 42 else "all is well\n")
        rank_log.mark(path, *((rank_log.FAILED, "ValueError: <i>odd</i> weights") if rank == 42 else (rank_log.ENDED, "")))
    text = page([read_run(run)])
    elements = Elements(text)
    assert not elements.open and not any(tag in ("b", "i") and not given for tag, given in elements.found)
    assert elements.text.count("first cause: rank 42 on node5 (process 42)") == 2  # at the top, too
    for said in ("<b>not so well</b>", "ValueError: <i>odd</i> weights", "1 rank that did not end as the other 99"):
        assert said in elements.text

"""The page in a real browser: it opens quickly, asks for nothing, is accessible, and lets one find an episode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from made_run import HOSTILE, episode, hostile_run, made_run, repeated_run, write_lines
from must_have import may_lack

from megatron_spice.report.page import page
from megatron_spice.report.runs import read_run

AXE = Path(__file__).parents[2] / "assets" / "axe-core" / "package" / "axe.min.js"
PHONE, DESK = 390, 1280
pytestmark = pytest.mark.skipif(find_chromium() is None and may_lack("chromium"), reason="no Chromium here (tests/run.sh installs Debian's)")


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The report of 50 iterations of 64 episodes."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "report.html"
    path.write_text(page([read_run(repeated_run(folder / "repeated"))]), encoding="utf-8")
    return path


def read_episodes(browser: Browser) -> None:
    """Scrolls to the episodes and waits until they are there."""
    browser.evaluate("document.getElementById('episodes').scrollIntoView()")
    browser.wait_for("!document.getElementById('filters').hidden")


def fill(browser: Browser, field: str, value: str, expected: int) -> None:
    """Sets a filter and waits for the number of episodes that fit."""
    browser.evaluate(f"(() => {{ const f = document.getElementById('f-{field}'); f.value = {json.dumps(value)}; document.getElementById('found').textContent = ''; f.dispatchEvent(new Event('input', {{bubbles: true}})); }})()")
    browser.wait_for(f"document.getElementById('found').textContent.startsWith('{expected:,} of')")


def test_fifty_iterations_open_in_two_seconds_and_ask_for_nothing(browser: Browser, large: Path) -> None:
    assert 1.5e6 < large.stat().st_size < 5e6
    browser.look(DESK)
    browser.open(large)  # the first page also starts the browser's processes
    assert min(browser.open(large) for _ in range(3)) < 2.0
    read_episodes(browser)
    assert browser.evaluate("document.getElementById('found').textContent") == "3,200 of 3,200 episodes"
    assert browser.requests == [large.resolve().as_uri()] and browser.complaints == []


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen(browser: Browser, large: Path, width: int) -> None:
    browser.look(width)
    browser.open(large)
    read_episodes(browser)
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here (tests/run.sh fetches it with npm)")
@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (PHONE, True)])
def test_no_violation_of_accessibility_rules(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(page([read_run(repeated_run(tmp_path / "run", 8, 1))]), encoding="utf-8")
    browser.look(width, dark=dark)
    browser.open(path)
    read_episodes(browser)
    browser.evaluate("document.querySelectorAll('details').forEach((one, place) => { one.open = place % 10 === 0; })")
    browser.evaluate("document.querySelector('.episode').open = true")
    browser.wait_for("!!document.querySelector('.open-episode')")
    browser.evaluate(AXE.read_text(encoding="utf-8") + "; 1")
    short = "(rules) => rules.map((one) => [one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)])"
    violations, passes = browser.evaluate(f"axe.run().then((found) => [({short})(found.violations), ({short})(found.passes)])")
    assert violations == []
    rules = {name: count for name, count, _ in passes}
    assert len(rules) > 25 and rules["color-contrast"] > 50


def test_episodes_are_searched_and_filtered(browser: Browser, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", 3, challenger__reward=lambda _: 0.0)
    invalid = episode(2, invalid="unparsable", task=None, answers=(), text="An odd attempt", reward=-0.1)
    write_lines(folder / "episodes.jsonl", [
        episode(1, "What is the capital of Peru?", "Lima", "Peru lies in the west.", ("Lima", "Quito")), episode(1, "How many?", "7", answers=("7", "7")),
        invalid, episode(3, "Which river?", "Nile", answers=("Rhine", "Oder")),
    ])  # fmt: skip
    (tmp_path / "report.html").write_text(page([read_run(folder)]), encoding="utf-8")
    browser.look(PHONE)
    browser.open(tmp_path / "report.html")
    browser.evaluate("[...document.querySelectorAll('a.find')].find((one) => one.dataset.text === 'Which river?').click()")
    browser.wait_for("!!document.querySelector('.episode[open] .attempt')")
    assert browser.evaluate("document.querySelector('.episode[open] .question-text').textContent") == "Which river?"
    for field in ("from", "to"):
        browser.evaluate(f"document.getElementById('f-{field}').value = ''")
    fill(browser, "text", "LIES IN the", 1)
    browser.evaluate("document.querySelector('.episode').open = true")
    browser.wait_for("document.querySelectorAll('.answers li').length === 2")
    shown = browser.evaluate("document.querySelector('#list').innerText")
    for text in ("Peru lies in the west.", "What is the capital of Peru?", "Lima", "1 of 2 right", "\u2717 wrong", "different", "reward 0.5"):
        assert text in shown
    assert browser.evaluate("document.querySelector('.open-episode mark').textContent") == "lies in the"
    fill(browser, "text", "", 4)
    fill(browser, "order", "last", 4)
    assert browser.evaluate("[...document.querySelectorAll('.when')].map((one) => one.textContent)") == [f"iteration {number}" for number in (3, 2, 1, 1)]
    fill(browser, "passed", "some", 1)
    fill(browser, "passed", "none", 1)
    fill(browser, "passed", "", 4)
    fill(browser, "valid", "unparsable", 1)
    browser.evaluate("document.querySelector('.episode').open = true")
    browser.wait_for("document.querySelector('#list').innerText.includes('An odd attempt')")
    fill(browser, "valid", "valid", 3)
    fill(browser, "from", "2", 1)
    fill(browser, "text", "no such words", 0)


def test_hostile_texts_stay_texts(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page([read_run(hostile_run(tmp_path / "<run>"))]), encoding="utf-8")
    browser.look(DESK)
    browser.open(path)
    read_episodes(browser)
    browser.evaluate("document.querySelectorAll('.episode').forEach((one) => { one.open = true; })")
    browser.wait_for("document.querySelectorAll('.open-episode').length > 20")
    assert browser.evaluate("document.title").startswith("<run>")
    assert browser.evaluate("document.querySelectorAll('#list img, #list script, #list svg, #list b').length") == 0
    shown = browser.evaluate("document.querySelector('#list').textContent")
    assert HOSTILE[0] in shown and "[U+0000][U+001B][31m[U+202E]reversed" in shown and "[U+D800] alone" in shown
    assert browser.complaints == []


def test_the_cursor_moves_by_keyboard_and_all_figures_follow(browser: Browser, large: Path) -> None:
    browser.look(DESK)
    browser.open(large)
    value = "[...document.querySelectorAll('#challenger .value, #time .value')].map((one) => one.textContent)"
    at_the_end = browser.evaluate(value)
    assert at_the_end[0] == "0.159 in iteration 50"
    browser.evaluate("document.querySelector('#challenger input').focus()")
    for _ in range(2):
        browser.press("ArrowLeft", 37)
    browser.wait_for(f"JSON.stringify({value}) !== {json.dumps(json.dumps(at_the_end, separators=(',', ':')))}")
    browser.wait_for("document.querySelector('#challenger input').getAttribute('aria-valuetext').startsWith('iteration 48')")
    assert browser.evaluate("[...document.querySelectorAll('.cursor')].every((one) => !one.hidden && one.textContent === '48')")

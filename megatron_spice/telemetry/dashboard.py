"""A run on one screen: what it learns, where its time goes, how its engines and its memory do.

Drawn from the files that every run writes, so it can be looked at from any machine that sees the run's folder, while it
runs or afterwards, and costs the run nothing. Texts of the model and of the corpus are shown as text: control characters and
Rich's markup in them do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_spice.telemetry import progress

RECENT = 10  # iterations that means are taken over
SILENT = 4  # engines that are shown by name
BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # one eighth of a character high to the whole
PHASE_COLOURS = ("blue", "dark_orange", "green", "magenta", "cyan", "yellow", "red")

# label, metric, limits of its curve (None: from the data), format
CURVES = (
    ("pass rate", progress.PASS_RATE, (0.0, 1.0), ".2f"),
    ("mixed tasks", progress.MIXED, (0.0, 1.0), ".2f"),
    ("valid attempts", progress.VALID, (0.0, 1.0), ".2f"),
    ("grounded answers", progress.GROUNDED, (0.0, 1.0), ".2f"),
    ("reward Challenger", progress.CHALLENGER_REWARD, None, ".2f"),
    ("reward Reasoner", progress.REASONER_REWARD, None, ".2f"),
    ("tokens/s", progress.SPEED, None, ",.0f"),
    ("drift, mean", progress.DRIFT[0], None, ".3f"),
)


@dataclass(frozen=True)
class Look:
    """What is known of a run at one moment.

    Attributes:
        records: its metrics, an iteration each.
        total: iterations that its recipe asks for, None when unknown.
        drift_alarm: the recipe's, None when unknown.
        episode: the last one written.
        engine_logs: their names and seconds since each was written to.
        now: seconds since the epoch.
    """

    name: str
    records: Sequence[dict]
    now: float
    total: int | None = None
    drift_alarm: float | None = None
    episode: dict | None = None
    engine_logs: Sequence[tuple[str, float]] = ()


def draw(look: Look) -> RenderableType:
    """The screen."""
    if not look.records:
        return Panel(Text("no iteration is finished yet"), title=Text(look.name))
    last = look.records[-1]
    parts: list[RenderableType] = [_head(look), _curves(look)]
    parts.append(Columns([_phases(look.records), _engines(look), _memory(last)], padding=(0, 1)))
    if look.episode is not None and (task := _task(look.episode)) is not None:
        parts.append(task)
    return Group(*parts)


def _head(look: Look) -> RenderableType:
    last = look.records[-1]
    number, total = last["iteration"], look.total
    seconds = _mean(look.records, progress.WHOLE)
    words = f"iteration {number}" + (f" of {total}" if total else "")
    words += f" | {_ago(look.now - last['time'])} ago" if "time" in last else ""
    if seconds is not None:
        words += f" | {seconds:.1f} s each"
        if total and number < total:
            words += f" | about {_ago(seconds * (total - number))} left"
    table = Table.grid(expand=True)
    table.add_row(Text(words))
    if total:
        table.add_row(ProgressBar(total=total, completed=number))
    return Panel(table, title=Text(look.name))


def _curves(look: Look) -> RenderableType:
    table = Table(expand=True, box=None, padding=(0, 1))
    table.add_column("")
    count = len(look.records)
    table.add_column(_Fitted(count, lambda shown: f"last {shown} iterations"), ratio=1, no_wrap=True)
    table.add_column("now", justify="right")
    table.add_column(f"mean of {min(RECENT, count)}", justify="right")
    for label, metric, limits, form in CURVES:
        values = [record.get(metric) for record in look.records]
        mean = _mean(look.records, metric)
        if mean is None:
            continue
        alarm = metric == progress.DRIFT[0] and look.drift_alarm is not None and (values[-1] or 0.0) > look.drift_alarm
        now = ("-" if values[-1] is None else format(values[-1], form)) + " !" * alarm
        curve = _Fitted(count, lambda shown, values=values, limits=limits: sparkline(values[-shown:], limits))
        table.add_row(label, curve, Text(now, "bold red" if alarm else "bold"), format(mean, form))
    return Panel(table, title="learning")


@dataclass(frozen=True)
class _Fitted:
    """A line about as many of the newest iterations as there is room for, `longest` at most: `line` is told how many. Rich itself
    would cut it at its right end, where the newest are."""

    longest: int
    line: Callable[[int], str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.line(min(self.longest, options.max_width)), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(self.longest, 1))


def sparkline(values: Sequence[float | None], limits: tuple[float, float] | None = None) -> str:
    """One character a value, its height between the limits (else the smallest and largest value); a space for none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return " " * len(values)
    low, high = limits or (min(known), max(known))
    span = high / 2 - low / 2 or 1.0  # halves: the difference of two large numbers may be none

    def bar(value: float) -> str:
        return BARS[round(min(max((value / 2 - low / 2) / span, 0.0), 1.0) * (len(BARS) - 1))]

    return "".join(" " if value is None or not math.isfinite(value) else bar(value) for value in values)


def _phases(records: Sequence[dict]) -> RenderableType:
    """Mean seconds by phase of the last iterations, longest bar for the longest phase."""
    names = [name for record in records[-RECENT:] for name in progress.phase_seconds(record)]
    means = {name: _mean(records, progress.SECONDS + name, missing=0.0) or 0.0 for name in dict.fromkeys(names)}
    whole = sum(means.values()) or 1.0
    table = Table.grid(padding=(0, 1))
    for place, (name, seconds) in enumerate(means.items()):
        bar = Text(BARS[-1] * max(round(20 * seconds / whole), 1 if seconds else 0), PHASE_COLOURS[place % len(PHASE_COLOURS)])
        table.add_row(Text(name), Text(f"{seconds:.1f} s"), Text(f"{seconds / whole:.0%}"), bar, Text(_slowest(records[-1], name)))
    return Panel(table, title="time by phase")


def _engines(look: Look) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    last = look.records[-1]
    for label, metric in (("restarts", "engines/restarts"), ("carried over", "game/carried_over")):
        if last.get(metric) is not None:
            table.add_row(Text(label), Text(f"{last[metric]:.0f}"))
    again = sum(record.get("engines/passages_again") or 0.0 for record in look.records)
    table.add_row(Text("passages again"), Text(f"{again:.0f}"))
    if (rate := last.get("sync/gib_per_second")) is not None:
        table.add_row(Text("sync"), Text(f"{rate:.2f} GiB/s"))
    silent = sorted(look.engine_logs, key=lambda each: each[1], reverse=True)
    if len(silent) > SILENT:
        table.add_row(Text("engine logs"), Text(f"{len(silent)}, the most silent:"))
    for name, seconds in silent[:SILENT]:
        table.add_row(Text(name), Text(f"wrote {_ago(seconds)} ago"))
    return Panel(table, title="engines")


def _slowest(record: dict, phase: str) -> str:
    """Which rank took longest for a phase in an iteration, and how long; "" where it is not known or all took as long."""
    return f"slowest: {most}" if (most := _of_rank(record, phase, "max", "s")) else ""


def _memory(record: dict) -> RenderableType:
    """GiB of the first rank, and the least and the most that any has."""
    table = Table.grid(padding=(0, 1))
    found = {name: value for name, value in record.items() if name.startswith("memory/") and name.endswith("_gib") and value is not None}
    for name, value in found.items():
        words = [f"{word} {theirs}" for word, end in (("least", "min"), ("most", "max")) if (theirs := _of_rank(record, name, end))]
        label = name.removeprefix("memory/").removesuffix("_gib").replace("_", " ")
        table.add_row(Text(label), Text(f"{value:.2f} GiB"), *map(Text, words))
    if not found:
        table.add_row(Text("not measured"))
    return Panel(table, title="memory")


def _of_rank(record: dict, name: str, end: str, unit: str = "") -> str:
    """The smallest or largest of all ranks and whose it is (`telemetry/ranks.py`); "" where it is not known or all are the same."""
    least, most = (record.get(f"ranks/{name}_{each}") for each in ("min", "max"))
    rank = record.get(f"ranks/{name}_{end}_rank")
    if least is None or most is None or rank is None or least == most:
        return ""
    value = least if end == "min" else most
    return (f"{value:.1f} {unit}" if unit else f"{value:.2f}") + f" rank {rank:.0f}"


def _task(episode: dict) -> RenderableType | None:
    """The task that the Reasoner got in the last episode, and how it did."""
    asked = [attempt for attempt in episode.get("attempts", []) if attempt.get("is_reasoner_task") and attempt.get("task")]
    if not asked:
        return None
    task, answers = asked[0]["task"], asked[0].get("answers") or []
    passed = sum(bool(answer.get("correct")) for answer in answers)
    table = Table.grid(padding=(0, 1))
    table.add_row("passage", _plain(episode.get("passage", {}).get("text", ""), 160))
    table.add_row("question", _plain(task.get("question", ""), 200))
    table.add_row("gold", _plain(task.get("gold_answer", ""), 60))
    table.add_row("answers", Text(f"{passed} of {len(answers)} correct"))
    return Panel(table, title=f"a task of iteration {episode.get('iteration')}")


def _plain(text: object, longest: int) -> Text:
    """Text on one line, without anything that a terminal would obey."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    return Text(line if len(line) <= longest else line[: longest - 3] + "...")


def _mean(records: Sequence[dict], metric: str, missing: float | None = None) -> float | None:
    """Mean over the last iterations that have the metric (or over all of them, with `missing` for those that lack it)."""
    values = [record.get(metric) for record in records[-RECENT:]]
    known = [missing if value is None else value for value in values if value is not None or missing is not None]
    return sum(known) / len(known) if known else None


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0.0):.0f} s"
    return str(timedelta(seconds=round(seconds))) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def engine_logs(run_dir: Path, now: float) -> list[tuple[str, float]]:
    """Name and seconds since the last writing of each engine's log."""
    return [(path.stem, now - path.stat().st_mtime) for path in sorted((run_dir / "logs").glob("engine_*.log"))]

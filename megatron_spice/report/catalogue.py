"""Which figures a report has, and how they are filled from groups of runs.

Each curve shows one metric, so that several groups can be laid over each other on the same axes; parts of a whole are drawn
once for each group, with the same height.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spice.report.change import smooth
from megatron_spice.report.figure import COLOURS, PARTS, Curves, Dots, Figure, Heat, Line, Stack
from megatron_spice.report.groups import Group, mean_of
from megatron_spice.telemetry import progress

INVALID = "challenger/invalid/"
PASSED = re.compile(r"reasoner/passed/(\d+)_of_(\d+)")
HISTOGRAM = (
    "A column is an iteration's tasks, by how many of their answers were right: the darker, the more tasks. At the very bottom and "
    "top nobody learns."
)
SHARE = (0.0, None)
FROM_ZERO = (0.0, None)
FREE = (None, None)


@dataclass(frozen=True)
class Curve:
    """A curve of the catalogue: which metric, in which section, in whose colour."""

    section: str
    metric: str
    title: str
    unit: str
    limits: tuple[float | None, float | None]
    colour: str
    note: str = ""


C, R, N = "challenger", "reasoner", "neutral"
CURVES = (
    Curve("challenger", progress.CHALLENGER_REWARD, "Challenger's reward", "mean reward", FREE, C,
          "Highest, 1, where half of the answers to a task are right; an attempt that is no task costs."),
    Curve("challenger", progress.MIXED, "Tasks at the frontier", "share of tasks", SHARE, C,
          "Some answers right, some wrong: only there either role learns."),
    Curve("challenger", progress.VALID, "Valid attempts", "share of attempts", SHARE, C,
          "Attempts that can be read as a question with an answer that can be checked."),
    Curve("challenger", progress.GROUNDED, "Answers found in the passage", "share of valid attempts", SHARE, C,
          "The gold answer occurs in the passage, and not in the question."),
    Curve("reasoner", progress.PASS_RATE, "Pass rate", "share of answers", SHARE, R,
          "Right answers, over all tasks. The tasks change as the Challenger learns."),
    Curve("reasoner", progress.REASONER_REWARD, "Reasoner's reward", "mean reward", SHARE, R,
          "Right answers to the one task of a passage that the Reasoner is trained on."),
    Curve("audit", "audit/agreement", "Gold answers that the passage bears out", "share of tasks", SHARE, C,
          "The task was answered again with the passage in view, and the answers agree."),
    Curve("audit", "audit/pass_minus_agreement", "Passed more often than borne out", "difference", FREE, C,
          "Far above zero both roles agree on what the passage does not say."),
    Curve("audit", "audit/duplicates", "Asked before, word for word", "share of tasks", SHARE, C),
    Curve("audit", "audit/near_duplicates", "Asked before, nearly", "share of tasks", SHARE, C),
    Curve("audit", "audit/constant_gold", "Met by one answer to all", "share of tasks", SHARE, C),
    Curve("audit", "audit/form_gold", "Met by the usual answer to such a question", "share of tasks", SHARE, C),
    Curve("audit", "audit/gives_away", "Questions that give the answer away", "share of tasks", SHARE, C),
    Curve("audit", "audit/copied", "Questions copied from the passage", "share of tasks", SHARE, C),
    Curve("audit", "audit/refers", "Questions that refer to the passage", "share of tasks", SHARE, C),
    Curve("audit", "audit/letter_most", "The commonest letter", "share of multiple choice", SHARE, C),
    Curve("audit", "audit/options_only", "Multiple choice met without the question", "share of tasks", SHARE, C),
    Curve("lengths", "challenger/length", "Length of attempts", "tokens", FROM_ZERO, C),
    Curve("lengths", "reasoner/length", "Length of answers", "tokens", FROM_ZERO, R),
    Curve("lengths", "challenger/truncated_share", "Attempts cut at the limit", "share of attempts", SHARE, C),
    Curve("lengths", "reasoner/truncated_share", "Answers cut at the limit", "share of answers", SHARE, R),
    Curve("lengths", "reasoner/no_answer_share", "Answers without an answer", "share of answers", SHARE, R),
    Curve("learning", "policy/loss", "Loss", "", FREE, N, "Of the policy gradient: it need not fall."),
    Curve("learning", "policy/grad_norm", "Gradient norm", "", FROM_ZERO, N),
    Curve("learning", "policy/entropy", "Entropy", "nats a token", FROM_ZERO, N, "Near zero the model says the same every time."),
    Curve("learning", "policy/kl", "Distance to the first model", "nats a token", FROM_ZERO, N),
    Curve("drift", progress.DRIFT[0], "Drift, mean", "nats a token", FROM_ZERO, N,
          "How far the engine's log-probabilities lie from the policy's for the same tokens and weights."),
    Curve("drift", progress.DRIFT[1], "Drift, 99th percentile", "nats a token", FROM_ZERO, N),
    Curve("drift", "policy/stale_token_share", "Tokens of earlier weights", "share of tokens", SHARE, N),
    Curve("time", progress.SPEED, "Speed", "tokens a second", FROM_ZERO, N, "Sampled and trained on."),
    Curve("engines", "game/seconds_per_passage", "Time of a passage", "seconds", FROM_ZERO, N),
    Curve("engines", "engines/passages_again", "Passages played again", "passages", FROM_ZERO, N, "After an engine was lost."),
    Curve("engines", "sync/gib_per_second", "Weights to the engines", "GiB a second", FROM_ZERO, N),
    Curve("engines", "memory/free_for_kv_cache_gib", "Free before play", "GiB", FROM_ZERO, N, "On the first rank's device."),
    Curve("engines", "memory/free_for_policy_gib", "Free before training", "GiB", FROM_ZERO, N, "On the first rank's device."),
    Curve("engines", "ranks/memory/free_for_kv_cache_gib_min", "Least free before play", "GiB", FROM_ZERO, N, "Of all ranks."),
    Curve("engines", "ranks/memory/free_for_policy_gib_min", "Least free before training", "GiB", FROM_ZERO, N, "Of all ranks."),
    Curve("engines", "ranks/memory/most_held_gib_max", "Most memory held", "GiB", FROM_ZERO, N,
          "By the rank that holds most: of its accelerator, on a CPU of the machine."),
    Curve("engines", "ranks/memory/free_on_host_gib_min", "Least free on a machine", "GiB", FROM_ZERO, N, "Of all ranks' machines."),
    Curve("engines", "verifier/timeouts", "Verdicts that ran out of time", "answers", FROM_ZERO, N),
)  # fmt: skip


def iterations_of(groups: Sequence[Group]) -> np.ndarray:
    """All iterations that any run has, ascending."""
    return np.unique(np.concatenate([run.iterations for group in groups for run in group.runs]))


def group_colours(groups: Sequence[Group]) -> list[str]:
    """A colour for each group; with a single one, none: curves have their role's."""
    return [PARTS[place % len(PARTS)] if len(groups) > 1 else "" for place in range(len(groups))]


def curves(section: str, groups: Sequence[Group]) -> list[Figure]:
    """The section's curves for which any run has values."""
    iterations = iterations_of(groups)
    found: list[Figure] = []
    for curve in CURVES:
        if curve.section != section:
            continue
        lines = [
            _line(group, curve.metric, iterations, colour or curve.colour)
            for group, colour in zip(groups, group_colours(groups))
            if any(np.isfinite(run.series(curve.metric)).any() for run in group.runs)
        ]
        if lines:
            name = curve.metric.replace("/", "-")
            found.append(Curves(name, curve.title, curve.unit, iterations, lines, curve.limits, curve.note))
    return found


def _line(group: Group, metric: str, iterations: np.ndarray, colour: str) -> Line:
    """A group's mean, smoothed; behind it what it was made from: a run's iterations, or the runs."""
    reach = reach_of(len(iterations))
    runs = group.series(metric, iterations)
    values = mean_of(runs)
    faint = runs if len(runs) == 1 else [smooth(run, reach) for run in runs]
    return Line(group.label, values, smooth(values, reach), colour, faint)


def reach_of(iterations: int) -> int:
    """How many neighbours on either side a bold line is the mean of."""
    return min(iterations // 20, 25)


def stacks(groups: Sequence[Group], name: str, title: str, unit: str, parts: Callable, note: str = "") -> list[Figure]:
    """One stack a group, all of the same height. `parts(group)` gives (label, metric, colour) from below."""
    found, iterations = [], iterations_of(groups)
    for place, group in enumerate(groups):
        layers = [(label, np.nan_to_num(group.mean(metric, iterations)), colour) for label, metric, colour in parts(group)]
        if layers:
            more, suffix = (f"-{place + 1}", f", {group.label}") if len(groups) > 1 else ("", "")
            found.append((name + more, title + suffix, layers))
    top = max((float(sum(values for _, values, _ in layers).max()) for *_, layers in found), default=0.0)
    return [Stack(full, words, unit, iterations, layers, top or 1.0, note) for full, words, layers in found]


def validity(groups: Sequence[Group]) -> list[Figure]:
    """Attempts by what became of them."""

    def parts(group: Group) -> list[tuple[str, str, str]]:
        rest = _largest(group, INVALID)
        known = any(progress.VALID in run.metrics() for run in group.runs)
        return [("valid", progress.VALID, "challenger")] * known + _coloured(rest, INVALID, PARTS[1:] + PARTS[:1])

    return stacks(groups, "validity", "What became of attempts", "share of attempts", parts)


def kinds(groups: Sequence[Group]) -> list[Figure]:
    """Valid tasks by the kind of their answers."""
    prefix = "challenger/kind/"
    return stacks(groups, "kinds", "Kinds of tasks", "share of valid attempts", lambda group: _coloured(_largest(group, prefix), prefix, PARTS))


def verdicts(groups: Sequence[Group]) -> list[Figure]:
    """Answers by how the verifier decided."""
    prefix = "verifier/reason/"
    return stacks(groups, "verdicts", "How answers were judged", "share of answers",
                  lambda group: _coloured(_largest(group, prefix), prefix, PARTS))  # fmt: skip


def phases(groups: Sequence[Group]) -> list[Figure]:
    """Seconds of an iteration by phase."""

    def parts(group: Group) -> list[tuple[str, str, str]]:
        names = [name for name in _largest(group, progress.SECONDS) if name != progress.WHOLE]
        return _coloured(sorted(names, key=lambda name: name.endswith("/other")), progress.SECONDS, PARTS)

    return stacks(groups, "phases", "An iteration by phase", "seconds", parts)


def _largest(group: Group, prefix: str) -> list[str]:
    """The metrics of that name that are not zero throughout, largest sums first."""
    sums: dict[str, float] = {}
    for run in group.runs:
        for metric in run.metrics():
            if metric.startswith(prefix):
                sums[metric] = sums.get(metric, 0.0) + float(np.nansum(run.series(metric)))
    return [metric for metric in sorted(sums, key=lambda name: -sums[name]) if sums[metric] > 0]


def _coloured(metrics: Sequence[str], prefix: str, palette: Sequence[str]) -> list[tuple[str, str, str]]:
    """With a colour each; the smallest, beyond the palette, share the grey of `other`."""
    names = [metric.removeprefix(prefix) for metric in metrics]
    colours = [*palette, *["other"] * len(names)]
    return [
        (name.replace("_", " "), metric, "other" if name == "other" else colour)
        for name, metric, colour in zip(names, metrics, colours)
    ]


def pass_rates(groups: Sequence[Group]) -> list[Figure]:
    """The histogram of pass rates, moving over the iterations."""
    found: list[Figure] = []
    iterations = iterations_of(groups)
    for place, group in enumerate(groups):
        names = {metric for run in group.runs for metric in run.metrics()}
        most = max((int(match[2]) for match in map(PASSED.fullmatch, names) if match), default=0)
        if not most:
            continue
        table = np.stack([group.mean(f"reasoner/passed/{passed}_of_{most}", iterations) for passed in range(most + 1)])
        more, suffix = (f"-{place + 1}", f", {group.label}") if len(groups) > 1 else ("", "")
        rows = [f"{passed} of {most}" for passed in range(most + 1)]
        title = f"How many answers were right{suffix}"
        found.append(Heat(f"pass-rates{more}", title, "share of tasks", iterations, rows, table, "reasoner", "" if found else HISTOGRAM))
    return found


def evaluations(groups: Sequence[Group]) -> list[Figure]:
    """A figure for each task that was evaluated, a row for each checkpoint."""
    colours = group_colours(groups)
    tasks: dict[str, list[tuple[str, float, float | None, float | None, str]]] = {}
    for group, colour in zip(groups, colours):
        for run in group.runs:
            for score in run.scores:
                before = f"{run.name}: " if len(groups) > 1 or len(group.runs) > 1 else ""
                what = score.label if score.iteration is None else f"iteration {score.iteration}"
                row = (before + what, score.score, score.low, score.high, colour or "reasoner")
                tasks.setdefault(score.task, []).append(row)
    found: list[Figure] = []
    for task, rows in tasks.items():
        most = max(value for row in rows for value in row[1:4] if value is not None)
        least = min(value for row in rows for value in row[1:4] if value is not None)
        unit, whole = ("share right", 1.0) if most <= 1.0 else ("percent", 100.0)
        slug = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")
        slug += f"-{len(found) + 1}" * any(figure.name == f"evaluation-{slug}" for figure in found)
        limits = (min(0.0, least), max(most, min(whole, most * 1.2 or whole)))
        found.append(Dots(f"evaluation-{slug}", task, unit, rows, limits))
    return found


assert {curve.colour for curve in CURVES} <= set(COLOURS)

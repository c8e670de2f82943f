"""The four questions a newcomer has, answered from the data in plain words: is the Challenger getting better, is the
Reasoner, what do the questions look like, where does the time go.

An answer claims a change only where its 95 % interval does not hold zero. What the data cannot tell is said, and so is what
would tell it: above all, a pass rate on tasks that change is no measure of the Reasoner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spice.report.change import SHORTEST, Change, between, change_over_seeds, mean_interval
from megatron_spice.report.episode_file import EpisodeFile, Window
from megatron_spice.report.evaluation import Score
from megatron_spice.report.groups import Group
from megatron_spice.report.text import one_line
from megatron_spice.report.words import duration, number, plural, points, reward, share, told
from megatron_spice.telemetry import progress

UNKNOWN = "Cannot be told from this run"
FEWEST_TASKS = 8  # below which nothing is said of the commonest answer
AGREEMENT = 0.25  # share of the commonest gold answer from which on both roles may have agreed on it


@dataclass(frozen=True)
class Answer:
    """An answer about a group of runs. `tone` is "good", "bad", "open" or "plain"; `verdict` is short, `headline` a sentence."""

    group: str
    verdict: str
    tone: str
    headline: str
    details: Sequence[str] = ()


def challenger(group: Group, early: Window | None = None, late: Window | None = None) -> Answer:
    """Is the Challenger getting better? By its reward; then what that is made of, and whether one answer has taken over."""
    found = _change(group, progress.CHALLENGER_REWARD)
    details = [
        _sentence(group, progress.VALID, "Valid attempts"),
        _sentence(group, progress.MIXED, "Tasks at the frontier, which some answers pass and some fail, "),
        _sentence(group, "challenger/reward_of_valid", "The reward of valid tasks alone", reward),
        _sentence(group, progress.GROUNDED, "Valid tasks whose answer stands in the passage"),
        _sentence(group, "audit/agreement", "Gold answers that the model agrees with when it reads the passage"),
    ]
    takes_over = _takes_over(early, late)
    details = [*filter(None, details), *_since_then(group), *(_agreement(early, late) if takes_over else [])]
    if any(run.recipe.get("game.fixed_challenger") is True for run in group.runs):
        return Answer(group.label, "It is not trained", "plain", "The recipe keeps the Challenger as it was (game.fixed_challenger).", details)
    if found is None:
        return Answer(group.label, UNKNOWN, "open", _too_short(group, progress.CHALLENGER_REWARD), details)
    verdict, tone = {1: ("Yes, it earns more", "good"), -1: ("No, it earns less", "bad"), 0: (UNKNOWN, "open")}[found.direction]
    if found.direction == 1 and takes_over:
        verdict, tone = "It earns more, but one answer has taken over", "open"
    return Answer(group.label, verdict, tone, f"Its mean reward {told(found)}, {_compared(found)}.", details)


def reasoner(group: Group, early: Window | None, late: Window | None) -> Answer:
    """Is the Reasoner getting better? By an evaluation on fixed questions, if there is one; the pass rate does not say."""
    found = _change(group, progress.PASS_RATE)
    rate = f"On the Challenger's tasks the pass rate {told(found, share, points)}, {_compared(found)}." if found else ""
    details = [_sentence(group, progress.REASONER_REWARD, "Its reward, on the tasks it is trained on,", reward), *_agreement(early, late)]
    details = list(filter(None, details))
    evaluated = evaluation_changes([run.scores for run in group.runs])
    if evaluated:
        return _evaluated(group, evaluated, [rate, *details] if rate else details)
    why = "The tasks change as the Challenger learns, so their pass rate does not say whether it reasons better. "
    details.append(why + "tools/evaluate.py, on fixed questions and two checkpoints, would (--output RUN_DIR/evaluation/iteration_N).")
    if found is None:
        return Answer(group.label, UNKNOWN, "open", _too_short(group, progress.PASS_RATE), details)
    verdict = {1: "It passes more tasks", -1: "It passes fewer tasks"}.get(found.direction)
    verdict = f"{verdict}; whether it reasons better cannot be told" if verdict else UNKNOWN
    return Answer(group.label, verdict, "open", rate, details)


def _evaluated(group: Group, evaluated: dict[str, Change], details: list[str]) -> Answer:
    form = share if all(max(each.first, each.last) <= 1 for each in evaluated.values()) else number
    said = [f"{task}: {told(each, form, points if form is share else number)}" for task, each in evaluated.items()]
    signs = {each.direction for each in evaluated.values()} - {0}
    verdict, tone = ("Better on some, worse on others", "open") if len(signs) == 2 else (UNKNOWN, "open")
    if len(signs) == 1:
        verdict, tone = ("Yes", "good") if signs == {1} else ("No, it got worse", "bad")
    seeds = max(each.seeds for each in evaluated.values())
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    headline = f"On fixed questions, first against last checkpoint evaluated{over}: {'; '.join(said)}."
    return Answer(group.label, verdict, tone, headline, details)


def evaluation_changes(runs: Sequence[Sequence[Score]]) -> dict[str, Change]:
    """By task, from the first to the last checkpoint that was evaluated.

    Of one run the interval takes both scores as independent; of several it comes from the spread of their changes.
    """
    tasks: dict[str, list[tuple[Score, Score]]] = defaultdict(list)
    for scores in runs:
        for task in dict.fromkeys(score.task for score in scores):
            rows = [score for score in scores if score.task == task and score.iteration is not None]
            if rows and rows[0].iteration != rows[-1].iteration:
                tasks[task].append((rows[0], rows[-1]))
    return {task: found for task, pairs in tasks.items() if (found := _evaluation_change(pairs)) is not None}


def _evaluation_change(pairs: Sequence[tuple[Score, Score]]) -> Change | None:
    before, after = (float(np.mean([pair[end].score for pair in pairs])) for end in (0, 1))
    if len(pairs) > 1:
        low, high = mean_interval([last.score - first.score for first, last in pairs])
        return Change(before, after, low, high, 1, len(pairs))
    ((first, last),) = pairs
    if None in (first.low, first.high, last.low, last.high):
        return None
    # The nearer ends of both intervals tell how far the change may be from what was seen (Newcombe's combination).
    down = float(np.hypot(last.score - last.low, first.high - first.score))
    up = float(np.hypot(last.high - last.score, first.score - first.low))
    return Change(before, after, after - before - down, after - before + up, 1)


def questions(group: Group, file: EpisodeFile | None) -> Answer:
    """What do its questions look like? From the episodes of the group's first run."""
    if file is None or not file.late.tasks:
        why = "No episodes were kept (telemetry.episodes)." if file is None else "The last iterations have no valid task."
        return Answer(group.label, UNKNOWN, "open", why)
    late, early = file.late, file.early
    kinds = ", ".join(f"{kind} {share(count / late.tasks)}" for kind, count in late.kinds.most_common())
    opening, opened = late.openings.most_common(1)[0]
    run = f"{group.runs[0].name}, " if len(group.runs) > 1 else "In "
    headline = (
        f"{run}{late.span}: {plural(late.tasks, 'valid task')}, {number(late.words / late.tasks)} words a "
        f"question, of kind {kinds}. \u201c{one_line(opening, 40)} \u2026\u201d begins {share(opened / late.tasks)} of them."
    )
    details = [f"{share(len(late.distinct) / late.tasks)} of the questions are distinct" + _before(early, lambda window: len(window.distinct))]
    if late.grounding_known:
        grounded = f"{share(late.grounded / late.grounding_known)} have an answer that stands in the passage"
        details.append(grounded + _before(early, lambda window: window.grounded))
    return Answer(group.label, _character(late), "plain", headline, [*details, *_agreement(early, late)])


def _character(window: Window) -> str:
    opening, opened = window.openings.most_common(1)[0]
    if opened / window.tasks >= 0.5:
        return f"Mostly \u201c{one_line(opening, 30)} \u2026?\u201d"
    kind, count = window.kinds.most_common(1)[0]
    return f"Mostly {kind}" if count / window.tasks >= 0.5 else "Of several kinds"


def _before(early: Window, count) -> str:
    """The rest of a sentence: how it was in the first iterations."""
    if not early.tasks:
        return "."
    return f" ({share(count(early) / early.tasks)} in {early.span})."


def _takes_over(early: Window | None, late: Window | None) -> bool:
    """Whether the commonest gold answer has become that of many tasks."""
    if late is None or late.tasks < FEWEST_TASKS:
        return False
    gold, count = late.golds.most_common(1)[0]
    return count / late.tasks >= max(AGREEMENT, 2 * _part_before(early, gold))


def _part_before(early: Window | None, gold: str) -> float:
    return early.golds[gold] / early.tasks if early is not None and early.tasks else 0.0


def _agreement(early: Window | None, late: Window | None) -> list[str]:
    """How common the commonest gold answer is; a warning where it takes over."""
    if late is None or late.tasks < FEWEST_TASKS:
        return []
    gold, count = late.golds.most_common(1)[0]
    said = f"The commonest gold answer, \u201c{one_line(gold, 40)}\u201d, is that of {share(count / late.tasks)} of the tasks in {late.span}"
    said += f" ({share(_part_before(early, gold))} in {early.span})" if early is not None and early.tasks else ""
    return [said + (": both roles may have agreed on an answer instead of learning." if _takes_over(early, late) else ".")]


def where_time_goes(group: Group) -> Answer:
    """Where does the time go?"""
    totals: dict[str, float] = defaultdict(float)
    for run in group.runs:
        for name in run.metrics():
            if name.startswith(progress.SECONDS):
                totals[name.removeprefix(progress.SECONDS)] += float(np.nansum(run.series(name)))
    whole = totals.pop(progress.WHOLE.removeprefix(progress.SECONDS), 0.0)
    if whole <= 0 or not totals:
        return Answer(group.label, UNKNOWN, "open", "No seconds were recorded.")
    order = sorted((name for name in totals if name != "other"), key=lambda name: -totals[name])
    parts = ", ".join(f"{name} {share(totals[name] / whole)}" for name in order if totals[name] / whole >= 0.0005)
    each = np.concatenate([run.series(progress.WHOLE) for run in group.runs])
    each = each[np.isfinite(each)]
    low, high = mean_interval(each.tolist())
    span = f" (95 % interval of the mean {number(low)} to {number(high)})" if len(each) > 1 else ""
    headline = f"An iteration took {duration(float(each.mean()))}{span}: {parts}."
    details = [f"{duration(whole)} in {plural(len(each), 'iteration')}; {share(totals.get('other', 0.0) / whole)} of it outside all phases."]
    for metric, words, form in ((progress.SPEED, "Tokens a second", number), (progress.WHOLE, "Seconds of an iteration", number)):
        details.append(_sentence(group, metric, words, form))
    details.append(_slowest_rank(group, whole))
    again = sum(float(np.nansum(run.series("engines/passages_again"))) for run in group.runs)
    if again:
        details.append(f"{number(again)} passages were played again because an engine was lost.")
    biggest = order[0] if order else "other"
    return Answer(group.label, f"Mostly into {biggest}: {share(totals[biggest] / whole)}", "plain", headline, list(filter(None, details)))


def _slowest_rank(group: Group, whole: float) -> str:
    """The phase in which ranks wait longest for the slowest of them, if that is worth a sentence."""
    lost: dict[str, float] = defaultdict(float)
    for run in group.runs:
        for name in run.metrics():
            phase = name.removeprefix("ranks/").removesuffix("_mean")
            if name == f"ranks/{phase}_mean" and f"{progress.SECONDS}{phase}" in run.metrics():
                lost[phase] += float(np.nansum(run.series(f"ranks/{phase}_max") - run.series(name)))
    phase = max(lost, key=lost.__getitem__, default=None)
    if phase is None or lost[phase] < 0.01 * whole:
        return ""
    ranks = np.concatenate([run.series(f"ranks/{phase}_max_rank") for run in group.runs])
    numbers, times = np.unique(ranks[np.isfinite(ranks)], return_counts=True)
    who = f", which is rank {numbers[times.argmax()]:.0f} in {share(times.max() / times.sum())} of the iterations," if len(numbers) else ""
    return f"The slowest rank{who} needs longer for {phase} than the mean of all ranks: {share(lost[phase] / whole)} of an iteration."


def _since_then(group: Group) -> list[str]:
    """Where the reward was clearly higher in an earlier fifth of a single run than in the last: "until, then"."""
    if len(group.runs) > 1:
        return []
    run = group.runs[0]
    values = run.series(progress.CHALLENGER_REWARD)
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 5 * SHORTEST:
        return []
    fifths = np.array_split(known, 5)
    best = max(range(5), key=lambda fifth: values[fifths[fifth]].mean())
    if best == 4:
        return []
    shortest, offset = len(fifths[4]), sum(len(fifth) for fifth in fifths[:best])
    found = between(values[known], slice(offset, offset + len(fifths[best])), slice(-shortest, None), looked_at=4, degree=4)
    numbers = run.iterations[fifths[best]]
    if found.direction >= 0:
        return []
    return [f"It was highest in iterations {numbers[0]} to {numbers[-1]} ({reward(found.first)}) and has fallen since, to {reward(found.last)}."]


def _change(group: Group, metric: str) -> Change | None:
    return change_over_seeds([run.series(metric) for run in group.runs])


def _sentence(group: Group, metric: str, words: str, form=share) -> str:
    found = _change(group, metric)
    return f"{words.strip()} {told(found, form, points if form is share else form)}." if found else ""


def _compared(found: Change) -> str:
    ends = f"the first {found.compared} iterations against the last {found.compared}"
    return f"{ends}, mean of {found.seeds} seeds" if found.seeds > 1 else ends


def _too_short(group: Group, metric: str) -> str:
    known = max(int(np.isfinite(run.series(metric)).sum()) for run in group.runs)
    return f"Only {plural(known, 'iteration')} with a value; a trend needs {SHORTEST} at least, and more to be sure of."



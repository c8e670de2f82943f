"""The outcome of a match: pass rates of every Reasoner on every Challenger's tasks, with intervals, as JSON, table and figure.

The unit is the task, of which there is one a passage: answers to one task go together, so intervals are percentiles of means over
tasks drawn again with replacement (bootstrap), not of single answers. They say how the same two models would do on other passages;
how another seed's models would do is not in them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_spice.crossplay.match import Match
from megatron_spice.crossplay.players import Player

RESAMPLES = 2000
OVER = "95 %, bootstrap over tasks, one a passage"


def interval(values: Sequence[float], seed: int = 0, confidence: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Bootstrap percentiles of the mean of many `values`; None for a single one, which has no spread."""
    if len(values) < 2:
        return None, None
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = round((1 - confidence) / 2 * (RESAMPLES - 1))
    return means[cut], means[-1 - cut]


def matrix(match: Match, challengers: Sequence[Player], reasoners: Sequence[Player]) -> dict[str, Any]:
    """What was found: by Challenger its validity, and for each pair the pass rate, its interval and the number of tasks. `refused`:
    passages and tasks that an engine would not take."""
    written = {
        player.name: {
            "passages": len(lines),
            "with_task": sum(line["task"] is not None for line in lines),
            "refused": sum("refused" in line for line in lines),
            "valid_share": sum(line["valid"] for line in lines) / max(1, sum(line["attempts"] for line in lines)),
        }
        for player in challengers
        for lines in [match.tasks(player)]
    }
    pairs = []
    for reasoner in reasoners:
        answers = match.answers(reasoner)
        for challenger in challengers:
            met = [line for line in answers if line["challenger"] == challenger.name]
            rates = [fmean(line["correct"]) for line in met if "refused" not in line]
            low, high = interval(rates)
            pairs.append({
                "challenger": challenger.name, "reasoner": reasoner.name, "tasks": len(rates), "refused": len(met) - len(rates),
                "pass_rate": fmean(rates) if rates else None, "low": low, "high": high,
            })  # fmt: skip
    sources = {player.name: player.source for player in (*challengers, *reasoners)}
    return {"models": sources, "challengers": written, "pairs": pairs, "interval": OVER}


def table(found: dict[str, Any]) -> str:
    """Reasoners down, Challengers across."""
    names = list(found["challengers"])
    rows = [["Reasoner \\ Challenger", *names]]
    for reasoner in dict.fromkeys(pair["reasoner"] for pair in found["pairs"]):
        pairs = {pair["challenger"]: pair for pair in found["pairs"] if pair["reasoner"] == reasoner}
        rows.append([reasoner, *(_cell(pairs[name]) for name in names)])
    rows.append(["valid attempts", *(f"{found['challengers'][name]['valid_share']:.0%}" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"n: tasks; [interval]: {OVER}, of these models alone"])


def _cell(pair: dict[str, Any]) -> str:
    if pair["pass_rate"] is None:
        return "no task"
    return f"{pair['pass_rate']:.3f} {_span(pair, '.3f')} n={pair['tasks']}"


def _span(pair: dict[str, Any], form: str) -> str:
    return "[no interval]" if pair["low"] is None else f"[{pair['low']:{form}}, {pair['high']:{form}}]"


def draw(found: dict[str, Any], path: Path) -> None:
    """The matrix as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    challengers = list(found["challengers"])
    reasoners = list(dict.fromkeys(pair["reasoner"] for pair in found["pairs"]))
    figure, axes = pyplot.subplots(figsize=(2.5 + 1.7 * len(challengers), 1.8 + 0.8 * len(reasoners)), layout="constrained")
    rates = [[float("nan")] * len(challengers) for _ in reasoners]
    for pair in found["pairs"]:
        row, column = reasoners.index(pair["reasoner"]), challengers.index(pair["challenger"])
        if pair["pass_rate"] is not None:
            rates[row][column] = pair["pass_rate"]
            words = f"{pair['pass_rate']:.2f}\n{_span(pair, '.2f')}"
            colour = "white" if pair["pass_rate"] < 0.5 else "black"
            axes.text(column, row, words, ha="center", va="center", fontsize=9, color=colour)
    image = axes.imshow(rates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(challengers)), challengers, rotation=20, ha="right")
    axes.set_yticks(range(len(reasoners)), reasoners)
    axes.set_xlabel("Challenger")
    axes.set_ylabel("Reasoner")
    figure.colorbar(image, label="pass rate")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

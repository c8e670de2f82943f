"""How a run's ranks ended, from their logs: who failed first, and the last that it said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spice.report.runs import Run
from megatron_spice.telemetry import rank_logs

MOST_ROWS = 64


@dataclass(frozen=True)
class Ranks:
    """A run's newest attempt. `told` says in a line who failed first, "" if nobody has; `tail` is what that rank said last.

    `rows`: (rank, node, attempts, how it ended); of more than `MOST_ROWS` ranks those that did not end as most have, `hidden` the
    number of the others.
    """

    run: str
    told: str
    tail: Sequence[str]
    rows: Sequence[tuple[int, str, int, str]]
    hidden: int


def ranks_of(run: Run) -> Ranks | None:
    """None where a run has no logs of ranks."""
    logs = rank_logs.read(run.folder)
    if not logs:
        return None
    shown = logs
    if len(logs) > MOST_ROWS:
        usual = Counter(log.state for log in logs).most_common(1)[0][0]
        shown = [log for log in logs if log.state != usual][:MOST_ROWS]
    cause = rank_logs.first_cause(logs)
    rows = [(log.rank, log.host, log.attempts, log.words()) for log in shown]
    return Ranks(run.name, rank_logs.told(logs), cause.tail if cause else (), rows, len(logs) - len(shown))

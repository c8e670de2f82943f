"""The one line an iteration that a person watches, and the names of the metrics that stand in it.

    iteration 3/50 | pass 0.31 | valid 0.56 | reward C 0.21 R 0.31 | 412 tok/s | play 14.2s train 10.1s | 26.1s

What an iteration has no value for is left out: with no valid task there is no pass rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PASS_RATE = "reasoner/pass_rate"
VALID = "challenger/valid_share"
CHALLENGER_REWARD = "challenger/reward"
REASONER_REWARD = "reasoner/reward"
GROUNDED = "challenger/grounded_share"
MIXED = "reasoner/mixed_share"
DRIFT = ("drift/mean", "drift/p99")
SPEED = "tokens_per_second"
SECONDS = "seconds/"
WHOLE = "seconds/iteration"
SHOWN_SECONDS = 0.05  # a shorter phase would read 0.0s


def progress_line(number: int, total: int, metrics: Mapping[str, float]) -> str:
    """The line of iteration `number` of `total`."""
    known = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
    rewards = [(label, known[key]) for label, key in (("C", CHALLENGER_REWARD), ("R", REASONER_REWARD)) if key in known]
    parts = [f"iteration {number}/{total}"]
    parts += [f"{label} {known[key]:.2f}" for label, key in (("pass", PASS_RATE), ("valid", VALID)) if key in known]
    if rewards:
        parts.append("reward " + " ".join(f"{label} {value:.2f}" for label, value in rewards))
    if SPEED in known:
        parts.append(f"{known[SPEED]:.0f} tok/s")
    phases = [f"{name} {seconds:.1f}s" for name, seconds in phase_seconds(known).items() if seconds >= SHOWN_SECONDS]
    if phases:
        parts.append(" ".join(phases))
    if WHOLE in known:
        parts.append(f"{known[WHOLE]:.1f}s")
    return " | ".join(parts)


def phase_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase out of an iteration's metrics, in their order, without the total."""
    return {
        key.removeprefix(SECONDS): value for key, value in metrics.items() if key.startswith(SECONDS) and key != WHOLE
    }

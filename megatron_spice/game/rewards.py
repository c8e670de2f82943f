"""Rewards of both roles [paper Eq. 1, sections 2.3, 4.3 and appendices B, D].

SPICE pays the Challenger for tasks at the frontier of what the Reasoner can do: half right, half wrong answers have the
largest variance p(1-p) = 0.25. The variance is the population's (a sample variance would move the optimum to 3/8), and
tau = 0.01 stands in the exponent as it is, not squared: the plateau is wide, 2/8 to 6/8 earn 0.82 and more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megatron_spice.game.text import normalise

VARIANCE_OPTIMUM = 0.25
VARIANCE_TAU = 0.01


def challenger_reward(kind: str, pass_rate: float) -> float:
    """Reward of a valid task whose answers were right with `pass_rate` in [0, 1].

    Args:
        kind: "variance" (SPICE), or an ablation: "threshold" (some but not all right), "r_zero" (1 - 2|p - 1/2|),
            "absolute_zero" (1 - p, and 0 where nothing can be learned, at p = 0). `game.challenger_reward` has one more,
            "r_zero_majority": `play.py` pays "r_zero" for it, by `majority_share` in place of the pass rate.

    Raises:
        ValueError: unknown kind, or a pass rate outside [0, 1].
    """
    if not 0.0 <= pass_rate <= 1.0:
        raise ValueError(f"pass_rate must lie in [0, 1], got {pass_rate}")
    if kind == "variance":
        variance = pass_rate * (1.0 - pass_rate)
        return math.exp(-((variance - VARIANCE_OPTIMUM) ** 2) / (2.0 * VARIANCE_TAU))
    if kind == "threshold":
        return 1.0 if 0.0 < pass_rate < 1.0 else 0.0
    if kind == "r_zero":
        return 1.0 - 2.0 * abs(pass_rate - 0.5)
    if kind == "absolute_zero":
        return 1.0 - pass_rate if pass_rate > 0.0 else 0.0
    raise ValueError(f"challenger_reward must be variance, threshold, r_zero or absolute_zero, got {kind!r}")


def majority_share(answers: Sequence[str | None]) -> float:
    """Share of answers that agree with the most frequent one, by form; those in which none was found agree with nobody.

    What R-Zero pays by in its own paper, where no gold answer is written: `challenger_reward("r_zero", majority_share(...))`.
    """
    counts = Counter(normalise(answer) for answer in answers if answer is not None)
    return max(counts.values(), default=0) / len(answers)


def reasoner_reward(correct: bool) -> float:
    """1 for a right answer, 0 for any other; form is neither paid nor fined [paper section 2.3]."""
    return 1.0 if correct else 0.0

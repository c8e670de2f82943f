"""What gold answers give away without the question being understood.

Self-written gold pays a Challenger and a Reasoner that share weights for any habit they have in common: always the same
letter, the same number, the number that follows from "How many". Each measure says what share of tasks a rule without
knowledge would meet; beside it stands what that rule meets by chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_spice.game.audit.words import words
from megatron_spice.game.options import LETTERS, split_options
from megatron_spice.game.records import Task
from megatron_spice.game.text import normalise


def letter_bias(letters: Mapping[str, int]) -> tuple[float, float]:
    """Pearson's chi-square of the gold letters against equal shares, and the probability of as much or more by chance.

    Args:
        letters: how often each of A to D was gold.

    Returns:
        (statistic, p-value with 3 degrees of freedom); (0, 1) without any. The approximation is good from 20 tasks on.
    """
    total = sum(letters.get(letter, 0) for letter in LETTERS)
    if not total:
        return 0.0, 1.0
    mean = total / len(LETTERS)
    statistic = sum((letters.get(letter, 0) - mean) ** 2 for letter in LETTERS) / mean
    return statistic, _survival_of_3(statistic)


def _survival_of_3(statistic: float) -> float:
    """P(X >= statistic) of a chi-square variable with 3 degrees of freedom, in closed form."""
    half = statistic / 2
    return math.erfc(math.sqrt(half)) + 2 * math.sqrt(half / math.pi) * math.exp(-half)


def constant_share(golds: Sequence[str]) -> float | None:
    """Share of tasks that one answer to all would have met: the most frequent gold of those before; None for fewer than two."""
    return form_share([""] * len(golds), golds)


def form_share(forms: Sequence[str], golds: Sequence[str]) -> float | None:
    """Share of tasks whose gold answer is the most frequent so far among those of its form; None for fewer than two tasks.

    Each task is judged by those before it, so that few tasks do not look alike for being few. Of equally frequent answers the
    first to become so is taken. With one form for all this is `constant_share`; what it is more than that, the form gives away.
    """
    if len(golds) < 2:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    favourite: dict[str, str] = {}
    met = 0
    for form, gold in zip(forms, golds):
        met += favourite.get(form) == gold
        counts[form, gold] += 1
        if form not in favourite or counts[form, gold] > counts[form, favourite[form]]:
            favourite[form] = gold
    return met / len(golds)


def form_of(question: str) -> str:
    """The question's form: its first two words, such as `how many`."""
    return " ".join(words(question)[:2])


def gold_key(task: Task) -> str:
    """The gold answer as it is counted."""
    return f"{task.answer_type == 'MCQ'} {normalise(task.gold_answer)}"


def is_longest_option(task: Task) -> bool | None:
    """Whether the gold option of a multiple choice task is longer than each other one; None if it is none."""
    split = split_options(task.question) if task.answer_type == "MCQ" else None
    if split is None:
        return None
    lengths = {letter: len(text) for letter, text in split[1].items()}
    gold = lengths.pop(task.gold_answer, 0)
    return gold > max(lengths.values())

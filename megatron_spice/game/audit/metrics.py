"""The audits of an iteration's tasks as numbers for the run's log.

All valid tasks of the audited passages are looked at, whether trained on or not; answers count where there are any. Metrics of
nothing (no multiple choice task, no re-answer) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any

from megatron_spice.game.audit import bias
from megatron_spice.game.audit.duplicates import Seen
from megatron_spice.game.audit.flags import flags_of
from megatron_spice.game.options import LETTERS
from megatron_spice.game.records import Answer, Attempt, Episode


class Audit:
    """Audits iteration after iteration; what it remembers are the questions that were asked.

    Args:
        passages: so many of an iteration's episodes are looked at, the first by when and where they were begun.
        memory: so many questions are remembered.
        has_corpus: whether tasks were written with a passage in view.
        asks_again: whether the Reasoner's tasks are answered again with their passages in view.
    """

    def __init__(self, passages: int, memory: int, has_corpus: bool = True, asks_again: bool = False) -> None:
        self._passages = passages
        self._has_corpus = has_corpus
        self._asks_again = asks_again
        self._seen = Seen(memory)

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """What this would remember had it audited earlier iterations, when a run goes on.

        Args:
            records: of their episodes (`episodes.episode_record`), iteration after iteration. Of one iteration the first are those that
                `metrics` has looked at, by when and where they were begun; the others' questions it has not seen.
        """
        for _, same in groupby(records, key=itemgetter("iteration")):
            asked = [(record["begun"], record["slot"], _questions(record)) for record in same]
            for *_, questions in sorted(asked, key=itemgetter(0, 1))[: self._passages]:
                for question in questions:
                    self._seen.add(question)

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """`audit/...` of one iteration's episodes.

        `tasks`; shares of them: `duplicates` (asked before, word for word), `near_duplicates` (nearly), `copied`, `refers`,
        `gives_away` (see `flags.py`), `constant_gold` (met by one answer to all), `form_gold` (met by the answer usual for the
        question's first words); `copied_words` on average. Of multiple choice: `letter_chi2`, `letter_p`, `letter_most` (share of the
        most frequent letter, so what always saying it would meet), `longest_option`. Where tasks were answered again: `agreement`
        with the passage in view, `pass_minus_agreement` of the same tasks (far above 0: roles agree on what the passage does
        not say), `options_only`, and of the Reasoner's tasks the share `not_asked`, for which the context had no room, or which were
        begun beyond the first passages of an iteration.
        """
        looked = list(episodes[: self._passages])
        valid = [(attempt, episode) for episode in looked for attempt in episode.attempts if attempt.task is not None]
        found = [flags_of(attempt.task, episode.passage.text if self._has_corpus else None) for attempt, episode in valid]
        kinds = Counter(self._seen.add(attempt.task.question) for attempt, _ in valid)
        tasks = [attempt.task for attempt, _ in valid]
        golds, forms = [bias.gold_key(task) for task in tasks], [bias.form_of(task.question) for task in tasks]
        values: dict[str, float | None] = {
            "tasks": float(len(tasks)),
            "duplicates": kinds["exact"] / len(tasks) if tasks else None,
            "near_duplicates": kinds["near"] / len(tasks) if tasks else None,
            **{name: _mean([getattr(flags, name) for flags in found]) for name in ("copied", "refers", "gives_away")},
            "copied_words": _mean([flags.copied_words for flags in found if flags.copied_words is not None]),
            "constant_gold": bias.constant_share(golds),
            "form_gold": bias.form_share(forms, golds),
            "longest_option": _mean([longest for task in tasks if (longest := bias.is_longest_option(task)) is not None]),
            **_letters([task.gold_answer for task in tasks if task.answer_type == "MCQ"]),
            **_answered_again([attempt for attempt, _ in valid]),
            "not_asked": self._not_asked([attempt for attempt, _ in valid]),
        }
        return {f"audit/{name}": value for name, value in values.items() if value is not None}

    def _not_asked(self, attempts: Sequence[Attempt]) -> float | None:
        tasks = [attempt for attempt in attempts if attempt.is_reasoner_task]
        return _mean([not attempt.grounded_answers for attempt in tasks]) if self._asks_again and self._has_corpus else None


def _questions(record: Mapping[str, Any]) -> list[str]:
    return [attempt["task"]["question"] for attempt in record["attempts"] if attempt["task"] is not None]


def _letters(golds: Sequence[str]) -> dict[str, float | None]:
    counts = Counter(golds)
    if not counts:
        return {}
    statistic, chance = bias.letter_bias(counts)
    return {
        "letter_chi2": statistic,
        "letter_p": chance,
        "letter_most": max(counts[letter] for letter in LETTERS) / counts.total(),
    }


def _answered_again(attempts: Sequence[Attempt]) -> dict[str, float | None]:
    read = [attempt for attempt in attempts if attempt.grounded_answers]
    agreement = _mean([_correct(attempt.grounded_answers) for attempt in read])
    passed = _mean([attempt.pass_rate for attempt in read if attempt.pass_rate is not None])
    return {
        "agreement": agreement,
        "pass_minus_agreement": None if agreement is None or passed is None else passed - agreement,
        "options_only": _mean([_correct(each.options_only_answers) for each in attempts if each.options_only_answers]),
    }


def _correct(answers: Sequence[Answer]) -> float:
    return fmean(answer.verdict.correct for answer in answers)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None

"""What comes out of episodes: trajectories for the policy, numbers for the run log, a line for the reader.

The line holds everything that a reward was computed from, so that rewards can be recomputed, and gold answers
audited, from the log alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.options import LETTERS
from megatron_spice.game.records import Answer, Attempt, Completion, Episode, InvalidReason, Role, Trajectory


def trajectories(episodes: Sequence[Episode], config: GameConfig, version: str | None = None) -> list[Trajectory]:
    """The sequences to train on: each episode's Challenger group (unless `fixed_challenger`), then its Reasoner group.

    Attempts of a group share their prompt, answers to a task theirs, and both stand next to each other.

    Args:
        version: of the weights that are about to be trained; tokens that other weights sampled are stale. None: none are.
    """
    found: list[Trajectory] = []
    for episode in episodes:
        if not config.fixed_challenger:
            group = _group(episode)
            found += [
                _trajectory("challenger", attempt.completion, attempt.advantage, attempt.reward, version) for attempt in group
            ]
        found += [
            _trajectory("reasoner", answer.completion, answer.advantage, answer.reward, version)
            for answer in trained_answers(episode)
        ]
    return found


def _trajectory(role: Role, completion: Completion, advantage: float, reward: float, version: str | None) -> Trajectory:
    num_stale = 0 if version is None else completion.num_stale(version)
    ids, logprobs = completion.completion_ids, completion.logprobs
    return Trajectory(role, completion.prompt_ids, ids, logprobs, advantage, reward, num_stale=num_stale)


def _group(episode: Episode) -> list[Attempt]:
    return [attempt for attempt in episode.attempts if attempt.in_group]


def trained_answers(episode: Episode) -> list[Answer]:
    """The answers to the one task that the Reasoner is trained on; none if the passage has no task."""
    return [answer for attempt in episode.attempts if attempt.is_reasoner_task for answer in attempt.answers]


def trained_part(episode: Episode) -> Episode:
    """The episode with what training needs of it and no more: trajectories and baselines of it are those of the whole one.

    Every rank gets this of every episode; texts, and completions that only paid somebody, go to whoever logs them.
    """
    attempts = [
        replace(
            attempt, completion=replace(attempt.completion, text=""), task=None, answers=_without_texts(attempt),
            grounded_answers=(), options_only_answers=(),
        )
        for attempt in _group(episode)
    ]  # fmt: skip
    return replace(episode, attempts=tuple(attempts), passage=replace(episode.passage, token_ids=(), text=""))


def _without_texts(attempt: Attempt) -> tuple[Answer, ...]:
    if not attempt.is_reasoner_task:
        return ()
    return tuple(replace(answer, completion=replace(answer.completion, text="")) for answer in attempt.answers)


def metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Numbers of an iteration. Shares and means of nothing are left out: an iteration without a valid task has no
    pass rate.

    `challenger/valid_share`, `.../invalid/<reason>` are of all attempts, `challenger/reward` and
    `.../advantage_nonzero_share` of the groups, `reasoner/pass_rate`, its histogram `reasoner/passed/<k>_of_<K>` and
    `mixed_share` (some right, some wrong) of all answered tasks, `reasoner/reward` of the answers trained on.
    """
    attempts = [attempt for episode in episodes for attempt in episode.attempts]
    group = [attempt for episode in episodes for attempt in _group(episode)]
    answered = [attempt for attempt in group if attempt.answers]
    trained = [answer for episode in episodes for answer in trained_answers(episode)]
    values: dict[str, float | None] = {
        "game/passages": float(len(episodes)),
        "game/passages_without_task": float(sum(not trained_answers(episode) for episode in episodes)),
        "game/trajectories": float(len(group) + len(trained)),
        "game/seconds_per_passage": _mean([episode.seconds for episode in episodes]),
        "verifier/timeouts": float(sum(episode.verifier_timeouts for episode in episodes)),
        "verifier/crashes": float(_reasons(answered)["crashed"]),
        **_challenger_metrics(attempts, group),
        **_reasoner_metrics(answered, trained),
    }
    return {name: value for name, value in values.items() if value is not None}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _reasons(answered: Sequence[Attempt]) -> Counter[str]:
    return Counter(answer.verdict.reason for attempt in answered for answer in attempt.answers)


def _challenger_metrics(attempts: Sequence[Attempt], group: Sequence[Attempt]) -> dict[str, float | None]:
    valid = [attempt for attempt in attempts if attempt.task is not None]
    invalid = Counter(attempt.invalid for attempt in attempts if attempt.invalid is not None)
    kinds = Counter(attempt.task.answer_type for attempt in valid)
    letters = Counter(attempt.task.gold_answer for attempt in valid if attempt.task.answer_type == "MCQ")
    known = [attempt.grounded for attempt in valid if attempt.grounded is not None]
    return {
        "challenger/attempts": float(len(attempts)),
        "challenger/valid_share": _mean([attempt.task is not None for attempt in attempts]),
        "challenger/grounded_share": _mean(known),
        "challenger/reward": _mean([attempt.reward for attempt in group]),
        "challenger/reward_of_valid": _mean([attempt.reward for attempt in group if attempt.task is not None]),
        "challenger/advantage_nonzero_share": _mean([attempt.advantage != 0.0 for attempt in group]),
        **_lengths("challenger", [attempt.completion for attempt in attempts]),
        **{
            f"challenger/invalid/{reason.value}": invalid[reason] / len(attempts)
            for reason in InvalidReason
            if attempts
        },
        **{f"challenger/kind/{kind}": count / len(valid) for kind, count in sorted(kinds.items())},
        # A Challenger that keeps putting the answer at one letter is paid for nothing: watch it.
        **{f"challenger/gold_letter/{letter}": letters[letter] / letters.total() for letter in LETTERS if letters},
    }


def _reasoner_metrics(answered: Sequence[Attempt], trained: Sequence[Answer]) -> dict[str, float | None]:
    rates = [attempt.pass_rate for attempt in answered]
    most = max((len(attempt.answers) for attempt in answered), default=0)
    passed = Counter(sum(answer.verdict.correct for answer in attempt.answers) for attempt in answered)
    reasons = _reasons(answered)
    return {
        "reasoner/tasks": float(len(answered)),
        "reasoner/pass_rate": _mean(rates),
        "reasoner/mixed_share": _mean([0.0 < rate < 1.0 for rate in rates]),
        "reasoner/reward": _mean([answer.reward for answer in trained]),
        "reasoner/advantage_nonzero_share": _mean([answer.advantage != 0.0 for answer in trained]),
        "reasoner/no_answer_share": _mean(
            [answer.verdict.extracted is None for attempt in answered for answer in attempt.answers]
        ),
        **_lengths("reasoner", [answer.completion for attempt in answered for answer in attempt.answers]),
        **{f"reasoner/passed/{count}_of_{most}": passed[count] / len(answered) for count in range(most + 1) if most},
        **{f"verifier/reason/{reason}": count / reasons.total() for reason, count in sorted(reasons.items())},
    }


def _lengths(role: Role, completions: Sequence[Completion]) -> dict[str, float | None]:
    return {
        f"{role}/length": _mean([len(completion.completion_ids) for completion in completions]),
        f"{role}/truncated_share": _mean([completion.finish == "length" for completion in completions]),
    }


def episode_record(episode: Episode) -> dict[str, Any]:
    """The episode as JSON: with the recipe's `game` settings (and, with `advantage_baseline: role`, the iteration's baselines in
    metrics.jsonl) every reward and advantage follows from it."""
    passage = episode.passage
    return {
        "iteration": episode.iteration,
        "begun": episode.iteration if episode.begun is None else episode.begun,
        "slot": episode.slot,
        "passage": {
            "index": passage.index,
            "document": passage.document,
            "source": passage.source,
            "text": passage.text,
        },
        "prompt_style": episode.prompt_style,
        "reasoner_prompt_style": episode.reasoner_prompt_style or episode.prompt_style,
        "answer_type": episode.answer_type,
        "seconds": round(episode.seconds, 3),
        "verifier_timeouts": episode.verifier_timeouts,
        "attempts": [_attempt_record(attempt) for attempt in episode.attempts],
    }


def _attempt_record(attempt: Attempt) -> dict[str, Any]:
    task = attempt.task
    return {
        "text": attempt.completion.text,
        "tokens": len(attempt.completion.completion_ids),
        "weights": attempt.completion.weight_versions,
        "finish": attempt.completion.finish,
        "valid": task is not None,
        "invalid": attempt.invalid.value if attempt.invalid else None,
        "grounded": attempt.grounded,
        "in_group": attempt.in_group,
        "reward": attempt.reward,
        "advantage": attempt.advantage,
        "task": {"question": task.question, "gold_answer": task.gold_answer, "answer_type": task.answer_type}
        if task
        else None,
        "is_reasoner_task": attempt.is_reasoner_task,
        "answers": [_answer_record(answer) for answer in attempt.answers],
        **{
            name: [_answer_record(answer) for answer in answers]
            for name in ("grounded_answers", "options_only_answers")
            if (answers := getattr(attempt, name))
        },
    }


def _answer_record(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.completion.text,
        "tokens": len(answer.completion.completion_ids),
        "weights": answer.completion.weight_versions,
        "finish": answer.completion.finish,
        "extracted": answer.verdict.extracted,
        "correct": answer.verdict.correct,
        "why": answer.verdict.reason,
        "reward": answer.reward,
        "advantage": answer.advantage,
    }

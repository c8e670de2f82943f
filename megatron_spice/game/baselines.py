"""Advantages against a running mean of each role's rewards, instead of the mean of an attempt's or answer's own group.

SPIRAL's role-conditioned advantage estimation (arXiv 2506.24119): Challenger and Reasoner are paid on
different scales, so each has a baseline of its own,

    A_i = r_i - b_role          b_role <- decay * b_role + (1 - decay) * mean of the role's rewards of this iteration

Unlike the group's mean it also tells good groups from bad ones: a group of equal rewards has a gradient. Two decisions of
ours: advantages are taken before the update, so that no reward lowers its own advantage; and a role's first rewards start
its baseline at their mean (not at zero, which would make every early advantage positive).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import get_args

from megatron_spice.game.episodes import trained_answers
from megatron_spice.game.records import Attempt, Episode, Role


class RoleBaselines:
    """The running means; part of a run's state.

    Args:
        decay: share of the old baseline that an iteration keeps, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        assert 0.0 <= decay < 1.0, f"decay {decay} is not in [0, 1)"
        self.decay = decay
        self._means: dict[str, float] = {}
        self._used: dict[str, float] = {}

    def apply(self, episodes: Sequence[Episode]) -> list[Episode]:
        """One iteration's episodes, advantages of what they train on replaced by reward minus baseline; then the baselines move
        on.

        A role that nothing was trained of keeps its baseline.
        """
        rewards = {
            "challenger": [attempt.reward for episode in episodes for attempt in episode.attempts if attempt.in_group],
            "reasoner": [answer.reward for episode in episodes for answer in trained_answers(episode)],
        }
        means = {role: fmean(paid) for role, paid in rewards.items() if paid}
        self._used = means | self._means
        for role, mean in means.items():
            self._means[role] = self.decay * self._used[role] + (1.0 - self.decay) * mean
        return [replace(episode, attempts=tuple(map(self._attempt, episode.attempts))) for episode in episodes]

    def _attempt(self, attempt: Attempt) -> Attempt:
        if attempt.in_group:
            attempt = replace(attempt, advantage=_difference(attempt.reward, self._used["challenger"]))
        if attempt.is_reasoner_task:
            baseline = self._used["reasoner"]
            answers = [replace(answer, advantage=_difference(answer.reward, baseline)) for answer in attempt.answers]
            attempt = replace(attempt, answers=tuple(answers))
        return attempt

    def metrics(self) -> dict[str, float]:
        """What was subtracted from the rewards of the last iteration: `challenger/baseline`, `reasoner/baseline`."""
        return {f"{role}/baseline": baseline for role, baseline in self._used.items()}

    def state_dict(self) -> dict[str, float]:
        """Baselines by role; a role not seen yet has none."""
        return dict(self._means)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError for a role that there is not."""
        if unknown := set(state) - set(get_args(Role)):
            raise ValueError(f"baselines of {sorted(unknown)}; the roles are {list(get_args(Role))}")
        self._means = {role: float(mean) for role, mean in state.items()}


def _difference(reward: float, baseline: float) -> float:
    """Exactly zero where rounding is all that is left: a trajectory without an advantage is not computed."""
    difference = reward - baseline
    return 0.0 if abs(difference) < 1e-9 else difference

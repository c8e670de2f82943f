"""How many tokens an iteration of a recipe has: assumed, since how long the model writes shows only when it does.

Completions of a group are taken as spread evenly from nothing to their limit, so half of it on average; a passage needs the
attempts of one group more often than not (`ATTEMPTS`), most attempts are tasks (`VALID`), and a prompt is the corpus's mean
passage and its instructions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from megatron_spice.config.schema import Config
from megatron_spice.cost.play import Batch
from megatron_spice.game.records import Trajectory

ATTEMPTS = 1.25  # groups of attempts a passage
VALID = 0.75  # of a group's attempts
INSTRUCTIONS = {"chat": 600, "few_shot": 115}  # tokens of a Challenger's prompt besides the passage
QUESTION = {"chat": 200, "few_shot": 65}  # tokens of a Reasoner's prompt
PASSAGE = 512  # where the corpus cannot be read


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of an iteration. `passages` of all engines; `attempts` and `tasks` a passage; prompts and longest completions."""

    passages: int
    group: int
    attempts: float
    tasks: float
    challenger_prompt: int
    reasoner_prompt: int
    challenger_limit: int
    reasoner_limit: int

    @classmethod
    def of(cls, config: Config) -> Workload:
        """What a recipe is expected to have."""
        game = config.game
        return cls(
            config.train.passages, game.group_size, ATTEMPTS * game.group_size, VALID * game.group_size,
            _passage_tokens(config) + INSTRUCTIONS[game.prompt_style], QUESTION[game.prompt_style], game.challenger_max_tokens,
            game.reasoner_max_tokens,
        )  # fmt: skip

    def batches(self, passages: float, in_flight: int) -> list[Batch]:
        """What one engine generates for so many passages, `in_flight` at a time."""
        rounds = max(1, math.ceil(passages / in_flight))
        at_once = passages / rounds
        return [
            Batch(max(1, round(at_once * count / per)), prompt, spread(limit, max(1, round(at_once * count / per)) * per))
            for count, per, prompt, limit in (
                (self.attempts, self.group, self.challenger_prompt, self.challenger_limit),
                (self.tasks * self.group, self.group, self.reasoner_prompt, self.reasoner_limit),
            )
        ] * rounds  # fmt: skip

    def trajectories(self, passages: int) -> list[Trajectory]:
        """What is trained on of so many passages: a group of each role."""
        found = []
        for number in range(passages):
            for role, prompt, limit in (
                ("challenger", self.challenger_prompt, self.challenger_limit), ("reasoner", self.reasoner_prompt, self.reasoner_limit),
            ):  # fmt: skip
                prompt_ids = (number, *([1] * (prompt - 1)))
                for length in spread(limit, self.group):
                    ids = (0,) * max(1, round(length))
                    found.append(Trajectory(role, prompt_ids, ids, (), advantage=1.0, reward=0.0))
        return found

    def trained_tokens(self) -> float:
        """Prompt and completion tokens of what is trained on, each trajectory for itself."""
        prompts = self.challenger_prompt + self.reasoner_prompt
        return self.passages * self.group * (prompts + (self.challenger_limit + self.reasoner_limit) / 2.0)

    def describe(self) -> str:
        """The assumptions, for people."""
        return (
            f"assumed: completions half as long as their limits on average ({self.challenger_limit // 2} and {self.reasoner_limit // 2} "
            f"tokens), prompts of {self.challenger_prompt} and {self.reasoner_prompt} tokens, {self.attempts:g} attempts and "
            f"{self.tasks:g} tasks a passage"
        )


def spread(limit: float, count: int) -> list[float]:
    """So many lengths, evenly from nothing to the limit, the longest of them at it."""
    return [limit * (place + 1) / count for place in range(count)]


def _passage_tokens(config: Config) -> int:
    try:
        manifest = json.loads((config.corpus.path / "manifest.json").read_text(encoding="utf-8"))
        return max(1, round(manifest["tokens"] / manifest["passages"]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return PASSAGE

"""Numbers of all ranks: the mean, the extremes and whose they are, the same on each; and what an episode leaves out for those that do
not log it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from ranks import run_ranks

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.baselines import RoleBaselines
from megatron_spice.game.episodes import trained_part, trajectories
from megatron_spice.game.records import Answer, Attempt, Completion, Episode, InvalidReason, Passage, Task, Verdict


SIZE = 3
LIKELY = (0.0, -0.0, 1.0, -1.0, 6.25, 1e-300, -1e300, 1e300)


def made(rank: int) -> dict[str, float]:
    """What a rank has: all kinds of numbers, some of them the same on several ranks, some on none."""
    dice, mine = random.Random(rank), {}
    for number in range(200):
        if dice.random() < 0.6:
            mine[f"seconds/{number}"] = dice.choice([dice.choice(LIKELY), dice.uniform(-1, 1), dice.gauss(0, 1) * 10 ** dice.randint(-9, 9)])
    return {**mine, "memory/held_gib": 2.0 + rank, "elsewhere": 1.0}


NAMES = [*(f"seconds/{number}" for number in range(200)), "memory/held_gib", "nobody/has_it"]


def spread_here() -> tuple[dict[str, float], int]:
    """On each rank: what is found, and by how many messages."""
    import torch.distributed as dist

    from megatron_spice.cluster import distributed, topology
    from megatron_spice.telemetry.ranks import spread

    here = topology.from_environment("cpu")
    with distributed.process_group(here, 60):
        calls, reduce = [], dist.all_reduce
        dist.all_reduce = lambda *arguments: calls.append(reduce(*arguments))
        return spread(made(here.rank), NAMES), len(calls)


def test_every_rank_learns_the_mean_and_the_extremes_and_whose_they_are():
    (found, messages), *others = run_ranks(SIZE, __file__, "spread_here", timeout=120)
    assert all(other == (found, messages) for other in others) and messages == 2
    expected: dict[str, float] = {}
    for name in NAMES:
        mine = {rank: made(rank)[name] for rank in range(SIZE) if name in made(rank)}
        short = f"ranks/{name.removeprefix('seconds/')}"
        if mine:
            expected |= {f"{short}_mean": math.fsum(mine.values()) / len(mine), f"{short}_min": min(mine.values()), f"{short}_max": max(mine.values())}
            expected |= {f"{short}_min_rank": min(mine, key=mine.__getitem__), f"{short}_max_rank": max(mine, key=mine.__getitem__)}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert found["ranks/memory/held_gib_max"] == 4.0 and found["ranks/memory/held_gib_max_rank"] == 2
    assert "ranks/elsewhere_mean" not in found and any(f"seconds/{number}" not in made(0) for number in range(200))


def test_what_every_rank_gets_of_an_episode_trains_the_same():
    def completion(place: int) -> Completion:
        return Completion((1, 2, 3), (place,), (-0.5,), "stop", "words", "3")

    def answers(task: int) -> tuple[Answer, ...]:
        return tuple(Answer(completion(10 * task + k), Verdict(k == 0, "4", "exact"), float(k == 0), 0.5 - k) for k in range(2))

    task = Task("What?", "4", "Integer")
    attempts = (
        Attempt(completion(1), task, None, True, True, answers(1), 0.9, 0.4, True), Attempt(completion(2), task, None, True, True, answers(2), 0.3, -0.1),
        Attempt(completion(3), None, InvalidReason.UNPARSABLE, None, True, (), -0.1, -0.3), Attempt(completion(4), task, None, True),
    )  # fmt: skip
    whole = Episode(1, 0, Passage(0, 0, "source", (7,) * 50, "a text"), "chat", "Integer", attempts)
    part = trained_part(whole)
    assert trajectories([part], GameConfig(), "3") == trajectories([whole], GameConfig(), "3") != []
    ours, theirs = RoleBaselines(0.9), RoleBaselines(0.9)
    assert trajectories(ours.apply([part]), GameConfig()) == trajectories(theirs.apply([whole]), GameConfig())
    assert ours.state_dict() == theirs.state_dict()
    assert part.passage.text == "" and len(part.attempts) == 3 and sum(len(each.answers) for each in part.attempts) == 2

"""Numbers of all ranks: the mean and the largest, the same on each; and what an episode leaves out for those that do not log it."""

from __future__ import annotations

from typing import Any

from ranks import run_ranks

from megatron_spice.config.schema import GameConfig
from megatron_spice.game.baselines import RoleBaselines
from megatron_spice.game.episodes import trained_part, trajectories
from megatron_spice.game.records import Answer, Attempt, Completion, Episode, InvalidReason, Passage, Task, Verdict


def spread_here() -> dict[str, float]:
    """On each rank."""
    import os

    from megatron_spice.cluster import distributed, topology
    from megatron_spice.telemetry.ranks import spread

    here = topology.from_environment("cpu")
    with distributed.process_group(here, 60):
        mine: dict[str, Any] = {"seconds/play": 2.0 + 4.0 * int(os.environ["RANK"])}
        if here.rank == 1:
            mine["seconds/recover"] = 1.0
        return spread(mine, ["seconds/play", "seconds/recover"])


def test_every_rank_learns_the_mean_and_the_largest():
    one, other = run_ranks(2, __file__, "spread_here", timeout=120)
    assert one == other == {
        "ranks/play_mean": 4.0, "ranks/play_max": 6.0, "ranks/recover_mean": 0.5, "ranks/recover_max": 1.0,
    }  # fmt: skip


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

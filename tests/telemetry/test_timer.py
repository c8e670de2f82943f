from __future__ import annotations

import pytest

from megatron_spice.telemetry.timer import PhaseTimer


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_to_the_iteration() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 1
    with timer.phase("play"):
        clock.now += 10
        with timer.phase("sync"):
            clock.now += 3
        clock.now += 2
    with timer.phase("play"):
        clock.now += 4
    clock.now += 0.5
    metrics = timer.metrics()
    assert metrics == {"seconds/sync": 3, "seconds/play": 16, "seconds/other": 1.5, "seconds/iteration": 20.5}
    timer.restart()
    clock.now += 2
    assert timer.metrics() == {"seconds/other": 2, "seconds/iteration": 2}


def test_a_failed_phase_is_counted() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(RuntimeError), timer.phase("outer"), timer.phase("inner"):
        clock.now += 5
        raise RuntimeError
    assert timer.metrics()["seconds/inner"] == 5
    assert timer.metrics()["seconds/outer"] == 0
    timer.restart()

"""Whole runs one after the other in one process, which loads the heavy packages once; called by `ranks.run_ranks`."""

from __future__ import annotations

import os
from typing import Any

from megatron_spice.cluster import platform
from megatron_spice.cluster.ports import ReservedPort
from megatron_spice.config.loader import load_config
from megatron_spice.rollout.two_engines import TwoEngines

SCORED = list(range(40, 100))


def runs(recipes: dict[str, tuple[str, list[str]]]) -> dict[str, dict[str, Any]]:
    """Trains each recipe (path, overrides).

    Returns by name: `fitted`, the steps of its warm-up; and of one with a second engine `policy` and `beside`, what these gave
    `SCORED` at the end.
    """
    platform.prepare("cpu")
    from megatron_spice.policy.policy import Policy
    from megatron_spice.train import train

    found: dict[str, dict[str, Any]] = {name: {"fitted": 0} for name in recipes}
    current = ""
    close, fit = TwoEngines.close, Policy.fit

    def score_and_close(engines: TwoEngines) -> None:
        if "policy" not in found[current]:
            engines.wake()
            found[current] |= {"policy": engines.score(SCORED), "beside": engines.beside.score(SCORED)}
        close(engines)

    def count_and_fit(policy: Policy, *arguments: Any) -> float:
        found[current]["fitted"] += 1
        return fit(policy, *arguments)

    TwoEngines.close, Policy.fit = score_and_close, count_and_fit
    for name, (path, overrides) in recipes.items():
        current = name
        port = ReservedPort()  # at the last run's port torch would hand out that run's store again, with all its counters
        port.release()
        os.environ["MASTER_PORT"] = str(port.number)
        train(load_config(path, overrides))
    return found

"""The warm-up: supervised steps on another run's accepted tasks and right answers, before iteration 1.

It is over before anything is played, and then saved as iteration 0, from which a run that was interrupted goes on: whether there
is a checkpoint is all that decides whether to warm up. The optimiser's moments go on from it, too. `policy.kl_coefficient`
measures the distance to `policy.model`, as it was before.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.curriculum.pairs import Pairs
from megatron_spice.telemetry.json_lines import JsonLines

if TYPE_CHECKING:
    from megatron_spice.assemble import Run

LOG_NAME = "warmup.jsonl"


def warm_up(run: Run, pairs: Pairs) -> None:
    """Takes the steps of `warmup` and saves. A collective of all ranks; the policy is awake."""
    config = run.config.warmup
    run.say(f"warm-up: {config.steps} steps on {len(pairs.places):,} pairs of {config.pairs}")
    log = JsonLines(run.config.run.dir / LOG_NAME, 0, run.checkpointer.look) if run.topology.is_first else None
    for step in range(config.steps):
        if run.interruption.agreed():
            run.say(f"interrupted ({run.interruption.reason}) in the warm-up, which the same command begins again")
            raise SystemExit(INTERRUPTED)
        started = time.perf_counter()
        batch = pairs.batch(step)
        loss = run.policy.fit(batch, config.learning_rate)
        tokens = sum(len(each.prompt_ids) + len(each.completion_ids) for each in batch)
        speed = tokens / (time.perf_counter() - started)
        run.say(f"warm-up {step + 1}/{config.steps} | loss {loss:.4f} | {speed:.0f} tok/s")
        if log is not None:
            log.write([{"iteration": step + 1, "loss": loss, "tokens": tokens}])
    if log is not None:
        log.close()
    run.say(f"saved {run.checkpointer.save(run.policy, run.state(0))}")

"""Training: SPICE's Algorithm 1 over four objects, a corpus sampler, a rollout pool, a policy and a checkpointer.

Every rank runs this file. `_iterate` is the algorithm, and the order in which engines and trainer share the
accelerators: drain and sleep the engines, train, wake their weights, sync, wake their KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from megatron_spice.assemble import Run, assemble
from megatron_spice.checkpoint import store as checkpoints
from megatron_spice.cluster import distributed, platform
from megatron_spice.cluster.topology import from_environment
from megatron_spice.config.schema import Config
from megatron_spice.game import episodes as game
from megatron_spice.game.records import Trajectory
from megatron_spice.rollout.engine import KV_CACHE, WEIGHTS
from megatron_spice.weights import sync


def train(config: Config) -> None:
    """Runs a recipe to its last iteration, from its newest checkpoint if it has one. Called on every rank."""
    device = platform.prepare(config.cluster.device)
    topology = from_environment(device)
    done = checkpoints.newest_iteration(config.run.dir) if config.checkpoint.resume == "auto" else 0
    if done >= config.train.iterations:
        if topology.is_first:
            print(f"{config.run.dir} is at iteration {done} of {config.train.iterations} already: nothing to do", flush=True)
        return
    with distributed.process_group(topology, config.cluster.timeout) as store, ExitStack() as stack:
        run = assemble(config, topology, store, stack)
        _sync(run, version=run.done)
        run.timer.restart()
        for iteration in range(run.done + 1, config.train.iterations + 1):
            _iterate(run, iteration)


def _iterate(run: Run, iteration: int) -> None:
    """One iteration of Algorithm 1."""
    config, timer = run.config, run.timer
    passages = run.sampler.next(config.train.passages)
    with timer.phase("play"):
        episodes = run.pool.play(iteration, passages)
    trajectories = game.trajectories(episodes, config.game)
    with timer.phase("train"), _accelerator_for_training(run):
        update = run.policy.update(trajectories)
    with timer.phase("sync"):
        synced = _sync(run, version=iteration)
    seconds = timer.metrics()
    timer.restart()
    if run.log is not None:
        speed = {"tokens_per_second": _count_tokens(trajectories) / seconds["seconds/iteration"]}
        run.log.episodes([game.episode_record(episode) for episode in episodes])
        run.log.iteration(
            iteration, config.train.iterations, {**game.metrics(episodes), **update, **synced, **speed, **seconds}
        )
        _warn_of_drift(run, update)
    if run.checkpointer.is_due(iteration, config.train.iterations):
        # After the log, which a resumed run cuts to the checkpoint: what is saved is also written. Its seconds are the
        # next iteration's.
        with timer.phase("save"):
            saved = run.checkpointer.save(run.policy, {"iteration": iteration, "sampler": run.sampler.state_dict()})
        run.say(f"saved {saved} in {timer.metrics()['seconds/save']:.1f} s")


@contextmanager
def _accelerator_for_training(run: Run) -> Iterator[None]:
    """The engines give their memory up for the length of the block; afterwards their weights are awake, to be written.

    Both ways all ranks wait for each other: an engine's memory lies on accelerators of ranks other than its host.
    """
    run.pool.sleep()
    dist.barrier()
    run.policy.wake()
    yield
    run.policy.sleep()
    dist.barrier()
    run.pool.wake([WEIGHTS])


def _sync(run: Run, version: int) -> dict[str, float]:
    """The policy's weights to all engines, checked; then the engines may play."""
    rollout = run.config.rollout
    seconds, num_bytes = sync.push(run.policy.hf_buckets, run.policy.hf_names, run.pool.engines, str(version))
    run.pool.wake([KV_CACHE])
    difference = None
    if rollout.verify_sync:
        tolerance = rollout.sync_tolerance or sync.TOLERANCE[run.config.policy.precision]
        difference = sync.verify(run.policy.score, run.pool.engines, run.probe_ids, tolerance)
    return sync.SyncReport(seconds, num_bytes, difference).metrics()


def _warn_of_drift(run: Run, update: dict[str, float]) -> None:
    if update.get("drift/mean", 0.0) > run.config.rollout.drift_alarm:
        run.say(
            f"warning: engine and policy log-probabilities differ by {update['drift/mean']:.3f} on average, over "
            f"rollout.drift_alarm={run.config.rollout.drift_alarm}"
        )


def _count_tokens(trajectories: list[Trajectory]) -> int:
    """Prompt and completion tokens of what is trained on, each trajectory for itself, as other trainers count."""
    return sum(len(trajectory.prompt_ids) + len(trajectory.completion_ids) for trajectory in trajectories)

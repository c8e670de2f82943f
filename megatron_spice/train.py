"""Training: SPICE's Algorithm 1 over four objects, a corpus sampler, a rollout pool, a policy and a checkpointer.

Every rank runs this file. `_iterate` is the algorithm. Engines and policy take turns on the accelerators: between
iterations the policy has them and the engines sleep, so that a checkpoint is saved from what is awake anyway, and an
iteration begins with the sync. `_to_engines` and `_to_policy` are the two hand-overs.

An engine may fail at any moment. The passages it was playing are played again: by the same hand-overs, after its
replacement has been started while the policy sleeps, as at the start of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from megatron_spice.assemble import Run, assemble, load_stack, watched
from megatron_spice.checkpoint import store as checkpoints
from megatron_spice.cluster import distributed, free_memory, platform
from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.cluster.interruption import Interrupted, Interruption
from megatron_spice.cluster.topology import from_environment
from megatron_spice.config.schema import Config
from megatron_spice.game import episodes as game
from megatron_spice.game.records import Episode, Trajectory
from megatron_spice.rollout.engine import KV_CACHE, WEIGHTS, EngineError, EnginesLost
from megatron_spice.telemetry.ranks import spread
from megatron_spice.warmup import warm_up
from megatron_spice.weights import sync


def train(config: Config, build: Callable[..., Run] = assemble) -> None:
    """Runs a recipe to its last iteration, from its newest checkpoint if it has one. Called on every rank; `build` puts the run
    together as `assemble` does."""
    device = platform.prepare(config.cluster.device)
    topology = from_environment(device)
    done = checkpoints.newest_iteration(config.run.dir) if config.checkpoint.resume == "auto" else 0
    if done >= config.train.iterations:
        if topology.is_first:
            print(f"{config.run.dir} is at iteration {done} of {config.train.iterations} already: nothing to do", flush=True)
        return
    load_stack()
    timeout = config.cluster.timeout
    with distributed.process_group(topology, timeout) as store, watched(config, topology, store), ExitStack() as stack:
        interruption = Interruption(store)
        try:
            run = build(config, topology, store, stack, interruption)
        except EngineError:
            # All of a job's processes are told to end, and an engine that only starts has no handler yet. Nothing is lost with it.
            if not interruption.agreed():
                raise
            if topology.is_first:
                print(f"interrupted ({interruption.reason}) while its engines started; the same command goes on", flush=True)
            raise SystemExit(INTERRUPTED) from None
        if run.pairs is not None:
            warm_up(run, run.pairs)
        for iteration in range(run.done + 1, config.train.iterations + 1):
            state = run.state(iteration - 1)
            try:
                if interruption.agreed():
                    raise Interrupted
                _iterate(run, iteration)
            except EnginesLost as error:
                raise _given_up(run, state, error) from None
            except Interrupted:
                run.say(f"interrupted ({interruption.reason}); the run {_saved_before_the_end(run, state)}; the same command goes on")
                raise SystemExit(INTERRUPTED) from None
        _finish_save(run, wait=True)


def _iterate(run: Run, iteration: int) -> None:
    """One iteration of Algorithm 1."""
    config, timer = run.config, run.timer
    with timer.phase("sync"):
        synced = _to_engines(run, version=iteration - 1)
    run.checkpointer.proceed()
    episodes, played = _play(run, iteration)
    if run.baselines is not None:
        episodes = run.baselines.apply(episodes)
    trajectories = game.trajectories(episodes, config.game, version=str(iteration - 1))
    with timer.phase("save"):
        _finish_save(run, wait=False)
    with timer.phase("wake"):
        woken = _to_policy(run)
    with timer.phase("train"):
        update = run.policy.update(trajectories)
    seconds = timer.metrics()
    timer.restart()
    memory = free_memory.held(run.topology.device)
    everyone = spread({**seconds, **memory, **_sent(synced), **woken})
    if config.policy.precision == "fp8" and iteration == run.done + 1:
        run.say("\n".join(run.policy.audit_lines()))
    if run.log is not None:
        speed = {"tokens_per_second": _count_tokens(trajectories) / seconds["seconds/iteration"]}
        baselines = run.baselines.metrics() if run.baselines is not None else {}
        engines = {"engines/restarts": run.engine_restarts}
        audited = run.audit.metrics(episodes) if run.audit is not None else {}
        saved = run.checkpointer.news()
        metrics = {
            **game.metrics(episodes), **audited, **played, **baselines, **update, **synced, **woken, **memory, **engines, **speed,
            **seconds, **saved, **everyone,
        }  # fmt: skip
        run.log.episodes([game.episode_record(episode) for episode in episodes])
        run.log.iteration(iteration, config.train.iterations, metrics)
        _warn_of_drift(run, update)
    if run.checkpointer.is_due(iteration, config.train.iterations):
        # After the log, which a resumed run cuts to the checkpoint: what is saved is also written. Its seconds are the
        # next iteration's, and so are those in which it is written: while passages are played.
        with timer.phase("save"):
            _finish_save(run, wait=True)
            run.checkpointer.begin(run.policy, run.state(iteration))


def _finish_save(run: Run, wait: bool) -> None:
    """Makes a checkpoint of what has been written meanwhile."""
    if (saved := run.checkpointer.finish(wait)) is not None:
        run.saved = checkpoints.iteration_of(saved)
        run.say(f"saved {saved}")


def _play(run: Run, iteration: int) -> tuple[list[Episode], dict[str, float]]:
    """Plays until the iteration has its episodes; games that an engine took with it are played again, those that were begun
    beyond the number wanted are carried over. Returns the episodes, those begun first first, and metrics."""
    wanted = run.config.train.passages
    games = run.games(iteration)
    episodes: list[Episode] = []
    num_again = num_aborted = 0
    while True:
        with run.timer.phase("play"):
            played = run.pool.play(iteration, games, wanted - len(episodes))
        games = played.left
        episodes += played.episodes
        num_aborted += played.num_aborted
        if (missing := wanted - len(episodes)) == 0:
            break
        num_again += missing
        run.say(f"iteration {iteration}: {missing} of {wanted} passages were lost with an engine, to be played again")
        with run.timer.phase("recover"):
            _to_engines(run, version=iteration - 1)
    run.carried = games
    metrics = {"engines/passages_again": num_again, "game/carried_over": len(games), "game/aborted": num_aborted}
    episodes.sort(key=lambda episode: (episode.begun, episode.slot))
    return episodes, {name: float(value) for name, value in metrics.items()}


def _to_engines(run: Run, version: int) -> dict[str, float]:
    """Hands the accelerators to the engines, all of which work and have the policy's weights afterwards."""
    _replace_lost_engines(run)
    metrics = _hand_over(run, version)
    while _replace_lost_engines(run):
        metrics = _hand_over(run, version)
    return metrics


def _replace_lost_engines(run: Run) -> bool:
    """Whether any engine had failed. Then there are new ones, which sleep like all others, and the policy is awake.

    Raises:
        EnginesLost: one failed too often.
        Interrupted: the job is to end, which may be why an engine has.
    """
    lost = run.pool.lost()
    if not lost:
        return False
    if run.interruption.agreed():
        raise Interrupted
    run.say("\n".join(f"warning: {words}; it is replaced" for words in lost))
    if run.policy.is_awake:
        run.policy.sleep(keep_weights=False)
    elif run.policy.weights_awake:
        run.policy.sleep_weights()
    dist.barrier()
    try:
        run.engine_restarts = run.restarts_before + run.pool.revive()
    except EnginesLost:
        if run.interruption.agreed():  # by now, so that the new ones were not waited for
            raise Interrupted from None
        raise
    _to_policy(run)
    return True


def _given_up(run: Run, state: dict[str, Any], error: EnginesLost) -> EngineError:
    """Saves the run as it was before this iteration, unless it is saved, and says what the user can do."""
    return EngineError(
        f"{error}\nThe run {_saved_before_the_end(run, state)}. Look at {run.config.run.dir}/logs/"
        "engine_*.log for the cause, then start the same command again: it goes on from there"
    )


def _saved_before_the_end(run: Run, state: dict[str, Any]) -> str:
    """Saves `state` and what the policy holds, unless that is saved, and says so. There may be half a minute for it (Slurm's KillWait),
    so it is written from where it is, be the policy asleep, and while it is written the engines are killed."""
    iteration, checkpointer = state["iteration"], run.checkpointer
    if iteration > run.saved and not checkpointer.is_under_way:
        checkpointer.begin(run.policy, state, is_over=True)
    checkpointer.proceed()
    run.pool.kill()
    _finish_save(run, wait=True)
    if iteration > run.saved:  # what was under way was of an earlier iteration
        checkpointer.save(run.policy, state, is_over=True)
    return f"is saved up to iteration {iteration} in {run.config.run.dir}" if iteration else "had no finished iteration to save"


def _hand_over(run: Run, version: int) -> dict[str, float]:
    """Hands the accelerators to the engines, with the policy's weights, and checks that they have arrived.

    Each waits for what it needs: the weights' place in the engines for gradients and optimiser state to be gone, the KV
    cache for the policy's own weights; gone is what the driver shows as free. And all ranks for each other: an engine's memory
    lies on accelerators of ranks other than its host.
    """
    config, policy, pool = run.config, run.policy, run.pool
    metrics = policy.sleep(keep_weights=True) | run.room.wait(WEIGHTS)
    dist.barrier()
    pool.wake([WEIGHTS])
    seconds, num_bytes = sync.push(_buckets(run), policy.rollout_names, pool.crew, str(version))
    ours = policy.score(run.probe_ids) if config.rollout.verify_sync else None
    metrics |= policy.sleep_weights() | run.room.wait(KV_CACHE)
    dist.barrier()
    pool.wake([KV_CACHE])
    difference = None
    if ours is not None:
        tolerance = config.rollout.sync_tolerance or sync.TOLERANCE[config.policy.precision]
        difference = sync.verify(ours, pool.crew, run.probe_ids, tolerance)
    return metrics | sync.SyncReport(seconds, num_bytes, difference, run.copy_rate).metrics()


def _buckets(run: Run) -> Callable[[], Iterator[dict[str, torch.Tensor]]]:
    """Gathers the weights, on a rank with engines into memory that these can read."""
    memory = run.parcel if run.pool.crew.engines else None
    return lambda: run.policy.rollout_buckets(memory)


def _to_policy(run: Run) -> dict[str, float]:
    """Hands the accelerators back to the policy once all engines are idle and asleep."""
    run.pool.sleep()
    dist.barrier()
    return run.policy.wake()


def _sent(metrics: dict[str, float]) -> dict[str, float]:
    """A hand-over's metrics for the comparison of ranks: one without an engine has sent nothing, and its rate is none."""
    return {name: value for name, value in metrics.items() if metrics["sync/gib"] or not name.startswith("sync/")}


def _warn_of_drift(run: Run, update: dict[str, float]) -> None:
    if update.get("drift/mean", 0.0) > run.config.rollout.drift_alarm:
        run.say(
            f"warning: engine and policy log-probabilities differ by {update['drift/mean']:.3f} on average, over "
            f"rollout.drift_alarm={run.config.rollout.drift_alarm}"
        )


def _count_tokens(trajectories: list[Trajectory]) -> int:
    """Prompt and completion tokens of what is trained on, each trajectory for itself, as other trainers count."""
    return sum(len(trajectory.prompt_ids) + len(trajectory.completion_ids) for trajectory in trajectories)

"""Training: SPICE's Algorithm 1 over four objects, a corpus sampler, a rollout pool, a policy and a checkpointer.

Every rank runs this file. Read `_iterate` first: it is the algorithm, and the order in which engines and trainer share
the accelerators (drain and sleep the engines, train, wake their weights, sync, wake their KV cache).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_spice.checkpoint import store as checkpoints
from megatron_spice.cluster import distributed, platform
from megatron_spice.cluster.topology import Topology, from_environment
from megatron_spice.config.describe import resolved
from megatron_spice.config.hf import read_architecture
from megatron_spice.config.schema import Config
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.game import episodes as game
from megatron_spice.game.play import play_passage
from megatron_spice.game.records import Trajectory
from megatron_spice.game.verify import Verifier
from megatron_spice.rollout.engine import KV_CACHE, WEIGHTS
from megatron_spice.rollout.placement import hosted_engine
from megatron_spice.rollout.pool import RolloutPool
from megatron_spice.rollout.supervisor import SglangEngine
from megatron_spice.telemetry.run_log import RunLog
from megatron_spice.telemetry.timer import PhaseTimer
from megatron_spice.weights import sync

# Scored by policy and engines after each sync. Any text would do; this one has names, numbers and punctuation.
PROBE = (
    "The river rises in the northern highlands, flows 1,024 km to the sea, and carries about 380 cubic metres of water a "
    "second past the old capital. Question: How long is the river? Answer: 1,024 km."
)


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
        run = _assemble(config, topology, store, stack)
        _sync(run, version=run.done)
        for iteration in range(run.done + 1, config.train.iterations + 1):
            _iterate(run, iteration)


@dataclass
class Run:
    """What one rank holds of a run; `log` only on the first. `done` is the iteration that was resumed from, 0 if none."""

    config: Config
    topology: Topology
    sampler: PassageSampler
    pool: RolloutPool
    policy: Any
    checkpointer: Any
    probe_ids: list[int]
    log: RunLog | None
    done: int
    timer: PhaseTimer

    def say(self, text: str) -> None:
        if self.topology.is_first:
            print(text, flush=True)


def _iterate(run: Run, iteration: int) -> None:
    """One iteration of Algorithm 1."""
    config, timer = run.config, run.timer
    timer.restart()
    passages = run.sampler.next(config.train.passages)
    with timer.phase("play"):
        episodes = run.pool.play(iteration, passages)
    trajectories = game.trajectories(episodes, config.game)
    with timer.phase("train"), _accelerator_for_training(run):
        update = run.policy.update(trajectories)
    with timer.phase("sync"):
        synced = _sync(run, version=iteration)
    if run.checkpointer.is_due(iteration, config.train.iterations):
        with timer.phase("save"):
            run.checkpointer.save(run.policy, {"iteration": iteration, "sampler": run.sampler.state_dict()})
    if run.log is not None:
        seconds = timer.metrics()
        speed = {"tokens_per_second": _count_tokens(trajectories) / seconds["seconds/iteration"]}
        run.log.episodes([game.episode_record(episode) for episode in episodes])
        run.log.iteration(
            iteration, config.train.iterations, {**game.metrics(episodes), **update, **synced, **speed, **seconds}
        )
        if update.get("drift/mean", 0.0) > config.rollout.drift_alarm:
            run.say(
                f"warning: engine and policy log-probabilities differ by {update['drift/mean']:.3f} on average, over "
                f"rollout.drift_alarm={config.rollout.drift_alarm}"
            )


@contextmanager
def _accelerator_for_training(run: Run) -> Iterator[None]:
    """The engines give their memory up for the length of the block; afterwards their weights are awake, to be written."""
    run.pool.sleep()
    dist.barrier()
    run.policy.wake()
    yield
    run.policy.sleep()
    run.pool.wake([WEIGHTS])


def _sync(run: Run, version: int) -> dict[str, float]:
    """The policy's weights to all engines, checked; then the engines may play."""
    rollout = run.config.rollout
    seconds, num_bytes = sync.push(run.policy.hf_buckets, run.pool.engines, str(version))
    run.pool.wake([KV_CACHE])
    difference = None
    if rollout.verify_sync:
        tolerance = rollout.sync_tolerance or sync.TOLERANCE[run.config.policy.precision]
        difference = sync.verify(run.policy.score, run.pool.engines, run.probe_ids, tolerance)
    return sync.SyncReport(seconds, num_bytes, difference).metrics()


def _count_tokens(trajectories: list[Trajectory]) -> int:
    """Prompt and completion tokens of what is trained on, each trajectory for itself, as other trainers count."""
    return sum(len(trajectory.prompt_ids) + len(trajectory.completion_ids) for trajectory in trajectories)


def _assemble(config: Config, topology: Topology, store: dist.Store, stack: ExitStack) -> Run:
    """Builds the four objects, starts the engines and loads the weights. What must be closed is given to `stack`."""
    from megatron_spice.checkpoint.checkpointer import Checkpointer, load_tensors
    from megatron_spice.policy.policy import Policy

    started = time.perf_counter()
    hf_files = checkpoints.hf_folder(config.policy.model)
    tokenizer = TextTokenizer.from_dir(hf_files)
    sampler = PassageSampler(Corpus(config.corpus.path, tokenizer), config.train.seed)
    checkpointer = Checkpointer(config.run.dir, config.checkpoint, hf_files, topology.is_first)
    resume = checkpointer.newest()
    done = checkpoints.read_state(resume)["iteration"] if resume else 0

    # Engines come up in processes of their own while this one builds the policy.
    pool = _make_pool(config, topology, store, tokenizer, hf_files)
    stack.callback(pool.close)
    pool.launch()
    policy = Policy(config, read_architecture(config.policy.model), topology)
    stack.callback(policy.close)
    if resume:
        load_tensors(policy, resume, with_optimizer=True)
        sampler.load_state_dict(checkpoints.read_state(resume)["sampler"])
    elif checkpoints.is_megatron(config.policy.model):
        load_tensors(policy, config.policy.model, with_optimizer=False)
    else:
        policy.load_hf(config.policy.model)
    policy.sleep()
    pool.start()

    log = stack.enter_context(RunLog(config.run.dir, config, resumed_from=done)) if topology.is_first else None
    if topology.is_first:
        (config.run.dir / "recipe.yaml").write_text(resolved(config))
    run = Run(config, topology, sampler, pool, policy, checkpointer, tokenizer.encode(PROBE), log, done, PhaseTimer())
    run.say(
        f"{'resumed from ' + str(resume) if resume else 'started'}: {policy.layout.describe()}, "
        f"{config.rollout.engines_per_node * topology.num_nodes} engine(s), ready after {time.perf_counter() - started:.0f} s"
    )
    return run


def _make_pool(
    config: Config, topology: Topology, store: dist.Store, tokenizer: TextTokenizer, hf_files: Any
) -> RolloutPool:
    number = hosted_engine(topology.local_rank, topology.local_world_size, config.rollout.engines_per_node)
    engines = []
    if number is not None:
        log_path = config.run.dir / "logs" / f"engine_{topology.node_rank}_{number}.log"
        engines.append(SglangEngine(config.rollout, topology, config.policy.precision, hf_files, log_path))
    verifier = Verifier(config.game.verifier)
    play = functools.partial(
        _play, tokenizer=tokenizer, verifier=verifier, config=config.game, temperature=config.rollout.temperature,
        top_p=config.rollout.top_p, seed=config.train.seed,
    )  # fmt: skip
    return RolloutPool(
        topology, store, engines, play, passages_in_flight=config.rollout.passages_in_flight, helpers=[verifier]
    )


async def _play(passage: Any, iteration: int, slot: int, engine: Any, **rest: Any) -> Any:
    return await play_passage(passage, iteration=iteration, slot=slot, engine=engine, **rest)

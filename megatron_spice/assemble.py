"""Puts a run together: the four objects that training talks to, with weights loaded and engines up."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_spice import challenger
from megatron_spice.checkpoint import store as checkpoints
from megatron_spice.checkpoint.ownership import Ownership
from megatron_spice.cluster.free_memory import EngineRoom
from megatron_spice.cluster.interruption import Interruption
from megatron_spice.cluster.topology import Topology
from megatron_spice.cluster.watchdog import Watchdog
from megatron_spice.cluster.whereabouts import HERE
from megatron_spice.config.describe import resolved
from megatron_spice.config.differences import differences
from megatron_spice.config.engine_weights import quantization_config
from megatron_spice.config.errors import ConfigError, storing
from megatron_spice.config.hf import hugging_face_folder, read_architecture
from megatron_spice.config.schema import AuditConfig, Config
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.curriculum.pairs import Pairs
from megatron_spice.game.audit.metrics import Audit
from megatron_spice.game.audit.reanswer import reanswered
from megatron_spice.game.baselines import RoleBaselines
from megatron_spice.game.carried import Game, game_from_state, game_state, new_games
from megatron_spice.game.play import Table, Wording, play_passage
from megatron_spice.game.records import Episode, Generator, Passage
from megatron_spice.game.verify import Verifier
from megatron_spice.policy import memory_budget
from megatron_spice.rollout.broadcast import Sender
from megatron_spice.rollout.buckets import Parcel
from megatron_spice.rollout.engine import Engine
from megatron_spice.rollout.placement import hosted_engine, remote_engines
from megatron_spice.rollout.pool import RolloutPool
from megatron_spice.rollout.remote import KEY_VARIABLE, Expected, RemoteEngine
from megatron_spice.rollout.supervisor import SglangEngine
from megatron_spice.rollout.two_engines import TwoEngines
from megatron_spice.telemetry import rank_log
from megatron_spice.telemetry.json_lines import each_json_line
from megatron_spice.telemetry.run_log import EPISODES_NAME, RunLog
from megatron_spice.telemetry.timer import PhaseTimer
from megatron_spice.weights.sync import copy_rate

if TYPE_CHECKING:
    from megatron_spice.checkpoint.checkpointer import Checkpointer
    from megatron_spice.corpus.dali_loader import DaliSampler
    from megatron_spice.policy.policy import Policy

# Scored by policy and engines after each sync. Any text would do; this one has names, numbers and punctuation.
PROBE = (
    "The river rises in the northern highlands, flows 1,024 km to the sea, and carries about 380 cubic metres of water a "
    "second past the old capital. Question: How long is the river? Answer: 1,024 km."
)


@dataclass
class Run:
    """What one rank holds of a run; `log` only on the first. `done` is the iteration that was resumed from, 0 if none.

    `baselines` are None where a group's own mean is subtracted. `carried` are games that earlier iterations have put off.
    """

    config: Config
    topology: Topology
    sampler: PassageSampler | DaliSampler
    baselines: RoleBaselines | None
    pool: RolloutPool
    room: EngineRoom
    policy: Policy
    checkpointer: Checkpointer
    probe_ids: list[int]
    log: RunLog | None
    done: int
    timer: PhaseTimer
    interruption: Interruption
    copy_rate: float  # bytes a second, the ceiling of a sync
    saved: int = 0  # the newest iteration whose checkpoint this run made or came from
    engine_restarts: int = 0  # since the run's first iteration
    restarts_before: int = 0  # those of earlier attempts
    parcel: Parcel = field(default_factory=Parcel)
    carried: list[Game] = field(default_factory=list)
    audit: Audit | None = None
    pairs: Pairs | None = None  # what a new run warms up with

    def games(self, iteration: int) -> list[Game]:
        """An iteration's batch: games that were put off, and as many new ones as are missing."""
        size = math.ceil(self.config.train.passages * self.config.rollout.oversample)
        return self.carried + new_games(iteration, self.sampler.next(max(0, size - len(self.carried))))

    def state(self, iteration: int) -> dict[str, Any]:
        """What a resumed run needs besides tensors, and what the tensors were made with: recipe.yaml, outside, is the newest
        attempt's."""
        return {
            "iteration": iteration, "sampler": self.sampler.state_dict(), "baselines": self.baselines.state_dict() if self.baselines else {},
            "carried": [game_state(game) for game in self.carried],
            "engines": {"seed": _engine_seed(self.config, self.done), "restarts": self.engine_restarts},
            "config": self.config.model_dump(mode="json"),
        }  # fmt: skip

    def say(self, text: str) -> None:
        """Prints on the first rank."""
        if self.topology.is_first:
            print(text, flush=True)


def assemble(
    config: Config, topology: Topology, store: dist.Store, stack: ExitStack, interruption: Interruption,
    make_engine: Callable[..., Engine] = SglangEngine,
) -> Run:
    """Builds the four objects, starts the engines and loads the weights. What must be closed is given to `stack`;
    passages that are being played are given up when there is an `interruption`.

    Afterwards the policy is awake and the engines sleep, as between any two iterations.

    Raises:
        ConfigError: the run's folder is in use, the run to be resumed has another corpus or seed than this recipe, the model cannot be
            asked as it says, this machine cannot run it, or an engine that should run already does not, or has another model.
    """
    from megatron_spice.checkpoint.checkpointer import Checkpointer, load_tensors
    from megatron_spice.policy.policy import Policy

    started = time.perf_counter()
    hf_files = hugging_face_folder(config.policy.model)
    tokenizer, reasoner = _spoken_to(config, hf_files)
    checkpointer = Checkpointer(config.run.dir, config.checkpoint, hf_files, _owned(config.run.dir, topology, stack))
    resume = _agreed(checkpointer.newest())
    state = checkpoints.read_state(resume) if resume else None
    sampler, baselines, carried, done = _passages(config, tokenizer, stack, state)
    restarts = 0
    if state is not None:
        restarts = state.get("engines", {}).get("restarts", 0)  # checkpoints of earlier versions do not say
        if topology.is_first:
            _say_what_is_new(resume, state, config)

    pairs = Pairs.open(config, tokenizer) if config.warmup.pairs is not None and not resume else None
    pool = _make_pool(config, topology, store, tokenizer, reasoner, hf_files, done, interruption, make_engine)
    stack.callback(pool.close)
    if topology.device == "cpu":
        # Engines come up in processes of their own while this one builds the policy. On an accelerator they would count
        # as theirs what the policy is about to take.
        pool.launch()
    policy = Policy(config, read_architecture(config.policy.model), topology)
    # On an accelerator a rank that fails leaves its groups as they are (`cluster.distributed.process_group`).
    stack.push(lambda kind, *_: policy.close() if kind is None or topology.device == "cpu" else None)
    stack.callback(checkpointer.close)
    compares = config.policy.kl_coefficient is not None
    if not resume or compares:
        if checkpoints.is_megatron(config.policy.model):
            load_tensors(policy, config.policy.model, with_optimizer=False)
        else:
            policy.load_hf(config.policy.model)
    if compares:
        policy.keep_reference()
    if resume:
        load_tensors(policy, resume, with_optimizer=True)
    checkpointer.reserve(policy)  # while engines start, if they do so beside it
    policy.sleep(keep_weights=False)
    dist.barrier()
    rate = copy_rate(policy.device)
    pool.start()
    dist.barrier()
    room = EngineRoom(topology.device, memory_budget.engine_weights(config, policy.architecture, on_cuda=True))
    before = room.free()
    dist.barrier()
    pool.sleep()
    dist.barrier()
    room.measure(before)
    policy.wake()

    log = stack.enter_context(RunLog(config.run.dir, config, resumed_from=done, look=checkpointer.look)) if topology.is_first else None
    if topology.is_first:
        with storing(config.run.dir / "recipe.yaml"):
            (config.run.dir / "recipe.yaml").write_text(resolved(config))
    run = Run(
        config, topology, sampler, baselines, pool, room, policy, checkpointer, tokenizer.encode(PROBE), log, done,
        PhaseTimer(on_phase=HERE.enter), interruption, rate, saved=done, carried=carried,
        engine_restarts=restarts, restarts_before=restarts,
        audit=_make_audit(config, done) if topology.is_first else None, pairs=pairs,
    )  # fmt: skip
    run.say(
        f"{f'resumed from {resume}' if resume else 'started'}: {policy.describe()}; "
        f"{_count_engines(config, topology)}, ready after {time.perf_counter() - started:.0f} s"
    )
    return run


def load_stack() -> None:
    """Imports what takes long, before ranks wait for each other; after `platform.prepare`."""
    from megatron_spice.checkpoint import checkpointer  # noqa: F401
    from megatron_spice.policy import policy  # noqa: F401


def watched(config: Config, topology: Topology, store: dist.Store) -> Watchdog:
    """The watchdog of a run, to be entered."""
    mine = rank_log.path_of(config.run.dir, topology.rank)
    return Watchdog(
        topology, store, config.cluster.timeout, host=rank_log.host_name(), log_of=functools.partial(rank_log.path_of, config.run.dir),
        mark=functools.partial(rank_log.mark, mine, rank_log.FAILED), tell=rank_log.tell,
    )  # fmt: skip


def _spoken_to(config: Config, hf_files: Path) -> tuple[TextTokenizer, Wording]:
    """The policy's tokenizer, and how it is asked.

    Raises:
        ConfigError: the tokenizer cannot be used, or its chat template, which `config/chat_templates.py` only looks for.
    """
    try:
        tokenizer = TextTokenizer.from_dir(hf_files)
        return tokenizer, Wording.of(config.game.prompt_style, tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(f"policy.model={config.policy.model}: {error}") from error


def _passages(
    config: Config, tokenizer: TextTokenizer, stack: ExitStack, state: dict[str, Any] | None
) -> tuple[PassageSampler | DaliSampler, RoleBaselines | None, list[Game], int]:
    """What decides on the passages to come, the games that were put off, and the iteration to go on from, as in `state`.

    Raises:
        ConfigError: the corpus cannot be used, or is not what the state belongs to.
    """
    baselines = RoleBaselines(config.game.baseline_decay) if config.game.advantage_baseline == "role" else None
    try:
        corpus = Corpus(config.corpus.path, tokenizer)
        sampler = _make_sampler(config, corpus, stack)
        if state is None:
            return sampler, baselines, [], 0
        sampler.load_state_dict(state["sampler"])
        if baselines is not None:
            baselines.load_state_dict(state.get("baselines", {}))
        carried = [game_from_state(each, corpus.passage) for each in state.get("carried", [])]
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return sampler, baselines, carried, state["iteration"]


def _say_what_is_new(checkpoint: Path, state: dict[str, Any], config: Config) -> None:
    """Which settings are not those that a checkpoint was made with, if it says: they are taken, and what they change is no accident
    that anybody should have to find."""
    if changed := differences(state["config"], config.model_dump(mode="json")) if "config" in state else []:
        print("\n  ".join([f"settings that are not those {checkpoint} was made with:", *changed]), flush=True)


def _owned(run_dir: Path, topology: Topology, stack: ExitStack) -> Ownership | None:
    """The first rank's hold on the run's folder. All ranks together raise ConfigError where it is in use."""
    owned, problems = None, []
    if topology.is_first:
        try:
            owned = stack.enter_context(Ownership(run_dir))
        except ConfigError as error:
            problems = error.problems
    if problems := _agreed(problems):
        raise ConfigError(problems)
    return owned


def _agreed(word_of_the_first: Any) -> Any:
    """The first rank's word, on where to go on for one: on a shared file system a node may see a folder as it was a while ago."""
    word = [word_of_the_first]
    dist.broadcast_object_list(word, 0)
    return word[0]


def _make_sampler(config: Config, corpus: Corpus, stack: ExitStack) -> PassageSampler | DaliSampler:
    if config.corpus.loader == "mmap":
        return PassageSampler(corpus, config.train.seed, config.corpus.weights)
    from megatron_spice.corpus.dali_loader import DaliSampler

    sampler = DaliSampler(corpus, config.train.seed, config.corpus.weights, batch_size=config.train.passages)
    stack.callback(sampler.close)
    return sampler


def _make_pool(
    config: Config, topology: Topology, store: dist.Store, tokenizer: TextTokenizer, reasoner: Wording, hf_files: Path, done: int,
    interruption: Interruption, make_engine: Callable[..., Engine],
) -> RolloutPool:
    """The pool with this rank's engine, if it hosts one."""
    rollout = config.rollout.model_copy(update={"seed": _engine_seed(config, done)})
    if rollout.engines:
        engines = _remote_engines(config, topology)
        numbers = [[url.rstrip("/") for url in rollout.engines].index(engine.url) for engine in engines]
    else:
        engines, numbers = [], []
        number = hosted_engine(topology.local_rank, topology.local_world_size, rollout.engines_per_node)
        if number is not None:
            log_path = config.run.dir / "logs" / f"engine_{topology.node_rank}_{number}.log"
            fp8 = rollout.weights == "fp8"
            told = quantization_config(config.policy, read_architecture(config.policy.model)) if fp8 else None
            engines.append(make_engine(
                rollout, topology, config.policy.precision, hf_files, log_path, quantization=told, is_ending=interruption.noted,
            ))  # fmt: skip
            numbers.append(topology.node_rank * rollout.engines_per_node + number)
    asked = challenger.wording(config, tokenizer)
    context = rollout.context_length or read_architecture(config.policy.model).max_position_embeddings
    if asked is None:  # servers of another model are asked for theirs
        challenger.check_context(config, reasoner, context)
    if config.game.fixed_challenger:
        moved = config.model_copy(update={"rollout": rollout})
        beside = challenger.engines_beside(moved, topology, numbers, tokenizer, interruption.noted)
        engines = [TwoEngines(policy, fixed) for policy, fixed in zip(engines, beside)]
    verifier = Verifier(config.game.verifier)
    play = functools.partial(
        _play, tokenizer=tokenizer, verifier=verifier, config=config.game, temperature=config.rollout.temperature,
        top_p=config.rollout.top_p, seed=config.train.seed, challenger=asked, context=context,
    )  # fmt: skip
    if config.audit.grounded_answers or config.audit.options_only:
        play = functools.partial(_play_and_audit, audit=config.audit, **play.keywords)
    return RolloutPool(
        topology, store, engines, play, passages_in_flight=config.rollout.passages_in_flight, decode=tokenizer.decode,
        max_restarts=config.rollout.max_restarts, helpers=[verifier], is_interrupted=interruption.asked,
        start_timeout=config.rollout.start_timeout,
    )  # fmt: skip


def _engine_seed(config: Config, done: int) -> int:
    """What the engines of an attempt sample from, if a completion has no seed of its own; an attempt that goes on from iteration
    `done` must not draw what the run drew at its start. (Engines that run already have seeds that nobody here knows.)"""
    return (config.rollout.seed + 7919 * config.train.seed + 104729 * done) % 2**31


def _remote_engines(config: Config, topology: Topology) -> list[Engine]:
    """Those of the servers that run already that this rank talks to. They are asked at once who they are, and all ranks together
    raise ConfigError with what was wrong with any."""
    rollout, shape = config.rollout, read_architecture(config.policy.model)
    expected = Expected(shape.family, shape.vocab_size, rollout.context_length or shape.max_position_embeddings)
    sender, key = Sender(topology.device), os.environ.get(KEY_VARIABLE, "")
    mine = remote_engines(topology.rank, topology.world_size, rollout.engines)
    engines = [RemoteEngine(url, rollout, key, expected, sender) for url in mine]
    problems: list[str] = []
    for engine in engines:
        try:
            engine.introduce()
        except ConfigError as error:
            problems += error.problems
    everyone: list[list[str]] = [[]] * topology.world_size
    dist.all_gather_object(everyone, problems)
    if any(everyone):
        raise ConfigError([problem for each in everyone for problem in each])
    return engines


def _count_engines(config: Config, topology: Topology) -> str:
    if config.rollout.engines:
        return f"{len(config.rollout.engines)} engine(s) that ran already"
    return f"{config.rollout.engines_per_node * topology.num_nodes} engine(s)"


async def _play(passage: Passage, iteration: int, slot: int, engine: Generator, **rest: Any) -> Episode:
    return await play_passage(passage, iteration=iteration, slot=slot, engine=engine, **rest)


async def _play_and_audit(
    passage: Passage, iteration: int, slot: int, engine: Generator, *, audit: AuditConfig, context: int, **rest: Any
) -> Episode:
    episode = await _play(passage, iteration, slot, engine, context=context, **rest)
    if slot >= audit.passages:
        return episode
    reasoner = Wording.of(rest["config"].prompt_style, rest["tokenizer"])
    table = Table(
        engine, rest["verifier"], rest["config"], reasoner, reasoner, rest["temperature"], rest["top_p"],
        (rest["seed"], iteration, slot),
    )  # fmt: skip
    return await reanswered(table, episode, audit.grounded_answers, audit.options_only, context)


def _make_audit(config: Config, done: int) -> Audit | None:
    """What audits the tasks of iterations after `done`; it has seen the questions of the earlier ones that the log holds."""
    if not config.audit.metrics:
        return None
    audit = Audit(
        config.audit.passages, config.audit.memory, has_corpus=not config.game.no_corpus, asks_again=config.audit.grounded_answers > 0
    )
    if done and (config.run.dir / EPISODES_NAME).is_file():
        audit.remember(record for record in each_json_line(config.run.dir / EPISODES_NAME) if record["iteration"] <= done)
    return audit

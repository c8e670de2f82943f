"""Puts a run's pool together: the engine this rank hosts, if any, and the game it plays. What `train.py` calls."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.schema import Config
from megatron_spice.game.play import play_passage
from megatron_spice.game.records import Episode, Passage, Tokenizer
from megatron_spice.game.verify import Verifier
from megatron_spice.rollout.engine import Engine
from megatron_spice.rollout.placement import hosted_engine
from megatron_spice.rollout.pool import RolloutPool
from megatron_spice.rollout.supervisor import SglangEngine


def colocated_pool(
    config: Config,
    topology: Topology,
    store: dist.Store,
    tokenizer: Tokenizer,
    model: Path,
    *,
    group: dist.ProcessGroup | None = None,
) -> RolloutPool:
    """The pool of this rank, not started.

    Args:
        store: shared by all ranks.
        model: Hugging Face folder with config and tokenizer; weights come by sync.
        group: a CPU process group of all ranks; None: the default group.

    Raises:
        ValueError: the engines do not fit the ranks of a node.
    """
    engines: list[Engine] = []
    number = hosted_engine(topology.local_rank, topology.local_world_size, config.rollout.engines_per_node)
    if number is not None:
        log = config.run.dir / "logs" / f"engine-{topology.node_rank}-{number}.log"
        engines.append(SglangEngine(config.rollout, topology, config.policy.precision, model, log))
    verifier = Verifier(config.game.verifier)

    async def play(passage: Passage, iteration: int, slot: int, engine: Engine) -> Episode:
        return await play_passage(
            passage,
            iteration=iteration,
            slot=slot,
            engine=engine,
            tokenizer=tokenizer,
            verifier=verifier,
            config=config.game,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            seed=config.train.seed,
        )

    return RolloutPool(
        topology,
        store,
        engines,
        play,
        passages_in_flight=config.rollout.passages_in_flight,
        helpers=[verifier],
        group=group,
    )

"""A policy that goes on learning while its checkpoint is being written; run by test_background.py on gloo ranks."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any


def save_while_learning(model: Path, run_dir: Path, trajectories: list, layout: dict[str, Any]) -> dict[str, Any]:
    with _policy(model, run_dir, layout) as (policy, checkpointer):
        from megatron_spice.checkpoint.checkpointer import load_tensors

        policy.update(trajectories)
        fsync, state = os.fsync, {"iteration": 1, "counter": {"drawn": 7}}
        os.fsync = lambda file: (time.sleep(1.0), fsync(file))  # a slow disk: the next step is over before the files are
        checkpointer.begin(policy, state)
        checkpointer.proceed()
        state["counter"]["drawn"] = 8
        early = checkpointer.finish(wait=False)
        then = [policy.update(trajectories)["policy/loss"] for _ in range(2)]
        saved = checkpointer.finish(wait=True)
        load_tensors(policy, saved, with_optimizer=True)
        again = [policy.update(trajectories)["policy/loss"] for _ in range(2)]
        return {"early": early, "then": then, "again": again, "news": checkpointer.news(), "later": checkpointer.news()}


def save_to_a_full_disk(model: Path, run_dir: Path, layout: dict[str, Any]) -> str:
    with _policy(model, run_dir, layout) as (policy, checkpointer):
        checkpointer.save(policy, {"iteration": 1})
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            checkpointer.save(policy, {"iteration": 2})
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "nothing failed"


class Few:
    """What is saved, without a model."""

    def holdings(self, with_optimizer: bool) -> Any:
        import torch

        from megatron_spice.checkpoint.pieces import Holdings, Piece

        row = Piece("row", (3,), (0,), (3,), torch.tensor([1.0, 2.0, 3.0]))
        return Holdings([row, Piece("number", (), (), (), torch.tensor([7.0]))], {}, {})


def close_before_writing(hf_files: Path, run_dir: Path) -> tuple[list[float], float]:
    from megatron_spice.cluster import distributed, platform
    from megatron_spice.cluster.topology import from_environment
    from megatron_spice.config.schema import CheckpointConfig

    platform.prepare("cpu")
    import torch
    from torch.distributed import checkpoint

    from megatron_spice.checkpoint.checkpointer import Checkpointer

    with distributed.process_group(from_environment("cpu"), 60):
        checkpointer = Checkpointer(run_dir, CheckpointConfig(), hf_files)
        checkpointer.begin(Few(), {"iteration": 5})
        checkpointer.close()
        found = {"row": torch.zeros(3), "number": torch.zeros(())}
        checkpoint.load(found, checkpoint_id=checkpointer.newest() / "weights")
    return found["row"].tolist(), found["number"].item()


def lose_the_folder(hf_files: Path, run_dir: Path, while_writing: bool) -> str:
    """Another start takes the folder before the second save, or in the middle of it."""
    from megatron_spice.cluster import distributed, platform
    from megatron_spice.cluster.topology import from_environment
    from megatron_spice.config.schema import CheckpointConfig

    platform.prepare("cpu")
    from megatron_spice.checkpoint import background
    from megatron_spice.checkpoint.checkpointer import Checkpointer
    from megatron_spice.checkpoint.ownership import Displaced, Owner, Ownership

    def take() -> None:
        Ownership(run_dir, replace(Owner.this(), token="newer", attempt="job 41 restart 1"))

    here = from_environment("cpu")
    with distributed.process_group(here, 60):
        checkpointer = Checkpointer(run_dir, CheckpointConfig(), hf_files, Ownership(run_dir) if here.is_first else None)
        few = Few() if here.is_first else Nothing()
        checkpointer.save(few, {"iteration": 1})
        if here.is_first and while_writing:
            index = background.write_index
            background.write_index = lambda *arguments: (take(), index(*arguments))
        elif here.is_first:
            take()
        try:
            checkpointer.save(few, {"iteration": 2})
        except Displaced as error:
            return str(error)
    return "it was saved"


class Nothing:
    """A rank that has nothing to save."""

    def holdings(self, with_optimizer: bool) -> Any:
        from megatron_spice.checkpoint.pieces import Holdings

        return Holdings([], {}, {})


@contextmanager
def _policy(model: Path, run_dir: Path, layout: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """A policy with the model's weights, and the checkpointer of a run."""
    from megatron_spice.cluster import distributed, platform
    from megatron_spice.cluster.topology import from_environment
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import CheckpointConfig, Config

    platform.prepare("cpu")
    from megatron_spice.checkpoint.checkpointer import Checkpointer
    from megatron_spice.policy.policy import Policy

    here = from_environment("cpu")
    with distributed.process_group(here, 60):
        settings = {"model": model, "precision": "fp32", "learning_rate": 1e-2, **layout}
        game = {"challenger_max_tokens": 16, "reasoner_max_tokens": 16}
        config = Config.model_validate({"run": {"dir": run_dir}, "corpus": {"path": "/"}, "policy": settings, "game": game})
        policy = Policy(config, read_architecture(model), here)
        policy.load_hf(model)
        yield policy, Checkpointer(run_dir, CheckpointConfig(), model)

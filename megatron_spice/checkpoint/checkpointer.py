"""Saves and loads a run: weights, optimiser, corpus cursor and counters, in Megatron's layout-free torch_dist format.

Everything random that training decides derives from its seed and these counters (the corpus order, the game's choices),
and the model has no dropout, so no generator's state has to be saved. What the engines sample is not repeated by a
resumed run, unless `rollout.deterministic` gives each completion its seed: they draw from a new seed.
"""

from __future__ import annotations

import copy
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException

from megatron_spice.checkpoint import store
from megatron_spice.checkpoint.background import BackgroundWrite
from megatron_spice.checkpoint.hf_files import copy_small_files
from megatron_spice.config.schema import CheckpointConfig


class Trainable(Protocol):
    """What is saved and loaded; `policy.Policy` is one."""

    def model_state(self) -> dict[str, Any]: ...

    def optimizer_state(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]: ...

    def load_state(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None: ...


@dataclass(frozen=True)
class _Pending:
    """A save that is under way."""

    write: BackgroundWrite
    partial: Path
    state: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, hf_files: Path, is_writer: bool) -> None:
        """
        Args:
            hf_files: folder with the model's config and tokenizer files, copied into every checkpoint.
            is_writer: this rank does the renaming and removing.
        """
        self.folder = store.folder_of(run_dir)
        self.config = config
        self.hf_files = hf_files
        self.is_writer = is_writer
        self._pending: _Pending | None = None

    def newest(self) -> Path | None:
        """The newest whole checkpoint to resume from, None for a fresh start (or with checkpoint.resume=never)."""
        if self.config.resume == "never":
            return None
        whole = store.whole_checkpoints(self.folder)
        return whole[-1] if whole else None

    def is_due(self, iteration: int, last: int) -> bool:
        """Whether iteration `iteration` (from 1) of `last` ends with a save."""
        return iteration % self.config.every == 0 or iteration == last

    def begin(self, policy: Trainable, state: dict[str, Any]) -> None:
        """Copies policy and run state (`state["iteration"]` names the folder) and begins to write them; the policy may change
        from here on. One save at a time: none may be under way."""
        assert self._pending is None, "a save is under way"
        iteration = state["iteration"]
        partial = self.folder / f"{store.name_of(iteration)}.partial"
        if self.is_writer:
            store.begin(self.folder, iteration)
            copy_small_files(self.hf_files, partial / store.HF)
        dist.barrier()
        request = dist_checkpointing.save(_tensors(policy, True), str(partial / store.WEIGHTS), async_sharded_save=True)
        self._pending = _Pending(BackgroundWrite(request), partial, copy.deepcopy(state))

    def finish(self, wait: bool) -> Path | None:
        """The checkpoint that was begun, once all of it is on disk, and then it is there whole; None while it is not (with
        `wait` never), or when none was begun.

        Raises:
            OSError: it could not be written, on any rank. What was saved before is still there.
        """
        if self._pending is None or not (wait or self._pending.write.is_written()):
            return None
        pending, self._pending = self._pending, None
        try:
            pending.write.finish()
        except CheckpointException as error:
            reasons = ", ".join(dict.fromkeys(str(failure[0]) for failure in error.failures.values())) or "another rank says why"
            raise OSError(f"{pending.partial} could not be written: {reasons}; earlier checkpoints are still there") from error
        if self.is_writer:
            store.finish(pending.partial, pending.state, self.config.keep)
        dist.barrier()
        return pending.partial.with_suffix("")

    def save(self, policy: Trainable, state: dict[str, Any]) -> Path:
        """`begin` and `finish` at once."""
        self.begin(policy, state)
        saved = self.finish(wait=True)
        assert saved is not None
        return saved


def save_tensors(policy: Trainable, folder: Path, with_optimizer: bool) -> None:
    """Writes the weights, and the optimiser if wanted, into an existing empty folder."""
    dist_checkpointing.save(_tensors(policy, with_optimizer), str(folder))


def _tensors(policy: Trainable, with_optimizer: bool) -> dict[str, Any]:
    model_state = policy.model_state()
    state = {"model": model_state}
    if with_optimizer:
        state["optimizer"] = policy.optimizer_state(model_state)
    _keep_results_here()
    return state


def _keep_results_here() -> None:
    """Gives Megatron's writer an ordinary queue for its results.

    It would start a process for that queue, of use only when the save itself runs in another process, and nothing ends
    that process when its rank is killed.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load_tensors(policy: Trainable, checkpoint: Path, with_optimizer: bool) -> None:
    """Loads a checkpoint's weights into whatever layout `policy` has, and the optimiser if wanted.

    Raises:
        ValueError: the checkpoint lacks tensors of this model.
    """
    model_state = policy.model_state()
    state = {"model": model_state}
    if with_optimizer:
        state["optimizer"] = policy.optimizer_state(model_state, is_loading=True)
    # What Transformer Engine keeps beside its weights is not in a checkpoint of Megatron's own layers: it starts anew.
    beside = [(chunk, name) for chunk, part in model_state.items() for name in part if "_extra_state" in name]
    loaded, _, absent = dist_checkpointing.load(
        state, str(checkpoint / store.WEIGHTS), strict=StrictHandling.RETURN_UNEXPECTED
    )
    lost = sorted(key for key in absent if not key.endswith("_extra_state"))
    if lost:
        raise ValueError(f"{checkpoint} lacks {lost[:5]} ({len(lost)} in all): it is of another architecture than its config.json")
    for chunk, name in beside:
        loaded["model"][chunk].setdefault(name, None)
    policy.load_state(loaded["model"], loaded["optimizer"] if with_optimizer else None)

"""Saves and loads a run: weights, optimiser, corpus cursor and counters, in Megatron's layout-free torch_dist format.

Everything random that training decides derives from its seed and these counters (the corpus order, the game's choices),
and the model draws nothing (`policy/chance.py` sees to it), so no generator's state has to be saved. What the engines sample is
not repeated by a resumed run, unless `rollout.deterministic` gives each completion its seed: they draw from a new seed.
"""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_spice.checkpoint import store
from megatron_spice.checkpoint.background import BackgroundWrite, Ranks, Target
from megatron_spice.checkpoint.ownership import Ownership
from megatron_spice.checkpoint.pieces import Holdings
from megatron_spice.checkpoint.snapshot import Snapshot
from megatron_spice.config.errors import storing
from megatron_spice.config.schema import CheckpointConfig

WRITE_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one that is still writing: a shared file system has bad days, and nobody is kept from working. Where a
run has nothing to do but wait for it, cluster.timeout ends that sooner."""

CLOSE_TIMEOUT = 60.0  # seconds that a run which ends by an error gives its last save


class Trainable(Protocol):
    """What is saved and loaded; `policy.Policy` is one."""

    def holdings(self, with_optimizer: bool) -> Holdings: ...

    def model_state(self) -> dict[str, Any]: ...

    def optimizer_state(self, model_state: dict[str, Any]) -> dict[str, Any]: ...

    def load_state(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None: ...


class Checkpointer:
    """The checkpoints of one run. All ranks call every method together, and make it together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, hf_files: Path, owner: Ownership | None = None) -> None:
        """
        Args:
            hf_files: folder with the model's config and tokenizer files, copied into every checkpoint.
            owner: the first rank's hold on `run_dir`; None elsewhere, and where nobody else can be.
        """
        self.folder = store.folder_of(run_dir)
        with storing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        self._home = store.identity(run_dir)
        self.config = config
        self.hf_files = hf_files
        self.owner = owner
        self.seconds: dict[str, float] = {}  # of the last save's parts: `snapshot`, and what `background.write` returns
        self.num_bytes = 0  # that this rank writes of tensors
        self._snapshot = Snapshot()
        self._ranks = Ranks(dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT))
        self._pending: BackgroundWrite | None = None
        self._news: dict[str, float] = {}

    def newest(self) -> Path | None:
        """The newest whole checkpoint to resume from, None for a fresh start (or with checkpoint.resume=never)."""
        if self.config.resume == "never":
            return None
        whole = store.whole_checkpoints(self.folder)
        return whole[-1] if whole else None

    def look(self) -> None:
        """Raises Displaced if the run has lost its folder; where `owner` is None, nothing."""
        if self.owner is not None:
            self.owner.check()

    def is_due(self, iteration: int, last: int) -> bool:
        """Whether iteration `iteration` (from 1) of `last` ends with a save."""
        return iteration % self.config.every == 0 or iteration == last

    def reserve(self, policy: Trainable) -> None:
        """Takes the memory that `begin` copies into, so that the first save holds nobody up for longer than the others."""
        self._snapshot.reserve(policy.holdings(with_optimizer=True).pieces)

    def begin(self, policy: Trainable, state: dict[str, Any], is_over: bool = False) -> None:
        """Copies policy and run state (`state["iteration"]` names the folder); the policy may change from here on. One save at a
        time: none may be under way.

        Args:
            is_over: the policy will not be used again, so that what is in host memory can be written from where it is.
        """
        assert self._pending is None, "a save is under way"
        began = time.perf_counter()
        held = policy.holdings(with_optimizer=True)
        stay = [piece for piece in held.pieces if is_over and not piece.tensor.is_cuda]
        copied, is_copied = self._snapshot.take([piece for piece in held.pieces if not is_over or piece.tensor.is_cuda])
        pieces = stay + copied
        target = Target(self.folder, self._home, copy.deepcopy(state), self.config.keep, self.hf_files, self.owner)
        self._pending = BackgroundWrite(target, Holdings(pieces, held.objects, held.common), self._ranks, is_copied)
        self.seconds["snapshot"] = time.perf_counter() - began
        self.num_bytes = sum(piece.tensor.nbytes for piece in pieces)

    @property
    def is_under_way(self) -> bool:
        """Whether a save was begun and not finished."""
        return self._pending is not None

    def proceed(self) -> None:
        """Begins to write what `begin` has copied, if anything: where the main thread has little to do, as the two share an
        interpreter and on a CPU their cores."""
        if self._pending is not None:
            self._pending.start()

    def finish(self, wait: bool) -> Path | None:
        """The checkpoint that was begun, once it is there whole; None while it is not (with `wait` never), or when none was
        begun.

        Raises:
            StorageError: it could not be written, on any rank. What was saved before is still there.
        """
        self.proceed()
        if self._pending is None or not (wait or self._pending.is_written()):
            return None
        pending, self._pending = self._pending, None
        pending.join()
        self.seconds |= pending.seconds
        saved = pending.result()
        self._news = {"save/write_seconds": self.seconds["write"], "save/gib": self.seconds["bytes"] / 2**30}
        return saved

    def news(self) -> dict[str, float]:
        """Metrics of a save that was finished since this was last asked: how long it was written for, beside the run, and what all
        ranks wrote."""
        news, self._news = self._news, {}
        return news

    def save(self, policy: Trainable, state: dict[str, Any], is_over: bool = False) -> Path:
        """`begin` and `finish` at once."""
        self.begin(policy, state, is_over)
        saved = self.finish(wait=True)
        assert saved is not None
        return saved

    def close(self) -> None:
        """Lets a save that was begun come to its end, for a while, also one of which nothing is written yet. A run that ends as
        it should has nothing left here."""
        self.proceed()
        if self._pending is not None:
            self._pending.join(CLOSE_TIMEOUT)


def load_tensors(policy: Trainable, checkpoint: Path, with_optimizer: bool) -> None:
    """Loads a checkpoint's weights into whatever layout `policy` has, and the optimiser if wanted.

    Raises:
        ValueError: the checkpoint lacks tensors of this model.
    """
    model_state = policy.model_state()
    state = {"model": model_state}
    if with_optimizer:
        state["optimizer"] = policy.optimizer_state(model_state)
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

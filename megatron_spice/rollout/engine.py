"""What a rollout engine is to the rest of the house, whatever serves it.

The pool and the weight sync talk to this protocol; `supervisor.py` implements it with an SGLang server, tests implement
it with a few lines. An engine has memory of two kinds that sleep apart, because weights must be awake (to be written)
before the KV cache is: `WEIGHTS` and `KV_CACHE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_spice.game.records import Completion, Sampling

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
MEMORY = (WEIGHTS, KV_CACHE)


class EngineError(RuntimeError):
    """An engine did not do what it was asked: it is gone, it refused, or it took longer than it may."""


class EngineRefused(EngineError):
    """An engine answered, and what it said was no: it is there, unlike one that does not answer at all.

    `status`: HTTP's; 400 is about the request alone (too long, say), so that others may well be served. `said`: the server's own
    words, where the message has more, such as the end of its log.
    """

    def __init__(self, message: str, status: int = 0, said: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class EnginesLost(EngineError):
    """Engines failed and cannot be replaced; every rank knows, and has nothing else wrong with it."""


class Engine(Protocol):
    """One engine. Every method but the asynchronous ones blocks; all raise EngineError."""

    def launch(self) -> None:
        """Starts it without waiting."""

    def wait_ready(self) -> None:
        """Returns when it answers; finite."""

    def close(self) -> None:
        """Ends it and everything it started; may be called twice."""

    def kill(self) -> None:
        """Ends it at once, whatever state it is in; may be called twice, and `launch` afterwards."""

    def check(self) -> None:
        """Raises EngineError when it has died, or does nothing although it was asked to."""

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """`num_samples` completions of one prompt."""

    async def abort(self) -> None:
        """Cuts short all that `generate` is waiting for: it answers what there is, with the finish "abort"."""

    async def close_requests(self) -> None:
        """Lets go of what `generate` holds on the running event loop."""

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Waits until it is idle and gives up these kinds of memory; those that sleep already are left alone."""

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """Takes these kinds of memory back."""

    def begin_update(self) -> None:
        """Opens a weight update: no generation until `end_update`."""

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Overwrites the weights with these Hugging Face names; they have been copied when it returns."""

    def end_update(self, version: str) -> None:
        """Closes the update; from here on completions carry `version`."""

    def weight_version(self) -> str:
        """The version of the last finished update."""

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities [length - 1] of `token_ids[1:]`, each given all before it, at temperature 1."""

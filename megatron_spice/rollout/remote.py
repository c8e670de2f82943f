"""An engine that somebody else runs: a rank of ours talks to it, gives it weights, and leaves it as it was.

It is not started, put to sleep or ended from here. Its accelerators are its own, so taking turns with the policy means no
more than waiting until it is idle. Weights come by broadcast (`broadcast.py`), wherever it runs. When it is lost, being
replaced means that it comes back: whoever runs it restarts it, and `wait_ready` waits for that. Nothing of its process can be
seen, so a hanging one is recognised by SGLang's own health check, asked only while there is work for it.

A server cannot be asked whether others use it too. It must not be: their requests would hold up every weight update, which
waits until the server is idle, and be answered by a model that changes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_spice.cluster.whereabouts import moved
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout.broadcast import Member, Sender, in_background
from megatron_spice.rollout.engine import MEMORY, EngineError, EngineRefused
from megatron_spice.rollout.remote_client import RemoteClient

if TYPE_CHECKING:
    import torch

KEY_VARIABLE = "SPICE_ENGINE_KEY"
"""The environment variable with the key that all of them, and the router, want. Never in a recipe, which is copied around."""
LOOK = 3.0
"""Seconds between two health checks of a server that has work."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The model that a server must have: `model_type`, vocabulary, and room for `context` tokens."""

    family: str
    vocab_size: int
    context: int


class RemoteEngine:
    """One server at `url`.

    Args:
        api_key: what it wants; "" for none.
        sender: shared by the engines of this rank.
    """

    def __init__(self, url: str, config: RolloutConfig, api_key: str, expected: Expected, sender: Sender) -> None:
        self.url = url.rstrip("/")
        self._config = config
        self._key = api_key
        self._expected = expected
        self._sender = sender
        self._member: Member | None = None
        self._client = self._connect()
        self._look: Future[bool] | None = None
        self._looked = 0.0

    # ---- life ---------------------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Checks that the server is there, wants this key and has the right model, before anything else is started.

        Raises:
            ConfigError: it is not what the recipe says.
        """
        try:
            self._recognise()
        except EngineError as error:
            raise ConfigError(f"rollout.engines: {error}") from error

    def launch(self) -> None:
        """Forgets the old connection."""
        self._client = self._connect()

    def wait_ready(self) -> None:
        """Returns when the server takes requests and has been recognised.

        Raises:
            EngineError: it is another one, or not there within `rollout.start_timeout`.
        """
        limit = self._config.start_timeout
        deadline = time.monotonic() + limit
        while not self._client.is_ready():
            if time.monotonic() > deadline:
                raise EngineError(
                    f"engine {self.url}: not ready within {limit:g} s (rollout.start_timeout); it is not started from here: "
                    "see what became of it where it runs"
                )
            moved()
            time.sleep(0.2)
        self._recognise()

    def check(self) -> None:
        """Raises EngineError when it has work and its health check failed; it is asked in the background, so seconds later."""
        look, now = self._look, time.monotonic()
        if look is not None and look.done():
            self._look, self._looked = None, now
            if not look.result() and self._client.num_running:
                raise EngineError(
                    f"engine {self.url} hangs or is gone: it has {self._client.num_running} requests and its health check was "
                    f"not answered within {self._config.hang_timeout:g} s (rollout.hang_timeout)"
                )
            if self._client.num_running:
                moved()
        elif look is None and self._client.num_running and now - self._looked > LOOK:
            self._look = in_background(lambda client=self._client: client.is_alive(self._config.hang_timeout))

    def kill(self) -> None:
        """Nothing more is sent to it. It is not ended: that is for whoever runs it."""
        self._look = None
        if self._member is not None:
            self._sender.remove(self._member)
            self._member = None

    def close(self) -> None:
        """Leaves the server in a state in which others can use it, if it answers; may be called twice."""
        was_member = self._member is not None
        self.kill()
        if was_member:
            with contextlib.suppress(EngineError):
                self._client.end_stale_update()

    def _connect(self) -> RemoteClient:
        router = self._config.router and self._config.router.rstrip("/")
        return RemoteClient(
            self.url, self._key, request_timeout=self._config.request_timeout, generate_url=router,
            sends_seeds=self._config.deterministic,
        )  # fmt: skip

    def _recognise(self) -> None:
        """Raises EngineError if this server cannot serve this run; otherwise it is ready for a weight update."""
        try:
            found = self._client.identity()
        except EngineRefused as error:
            wrong_key = " 401:" in str(error) or " 403:" in str(error)
            hint = f"it wants another key: give it in the environment variable {KEY_VARIABLE}"
            raise EngineError(f"engine {self.url}: {hint if wrong_key else 'is it SGLang?'}\n{error}") from error
        self._client.end_stale_update()
        expected, wrong = self._expected, list(found.obstacles)
        if found.family != expected.family:
            wrong.append(f"its model_type is {found.family}, policy.model's is {expected.family}")
        elif not self._client.has_vocabulary(expected.vocab_size):
            wrong.append(f"its vocabulary is not policy.model's, of {expected.vocab_size}")
        if self._config.deterministic and not found.samples_by_seeds:
            wrong.append("rollout.deterministic=true needs it to be started with --enable-deterministic-inference")
        if found.context < expected.context:
            wrong.append(
                f"its context of {found.context} tokens is less than the {expected.context} of this run: start it with "
                f"--context-length {expected.context}, or give rollout.context_length={found.context}"
            )
        if wrong:
            raise EngineError(f"engine {self.url} (it serves {found.model}) cannot be used: {'; '.join(wrong)}")
        self._member = Member(self._client, found.num_ranks, found.device)

    # ---- the verbs of `Engine` ----------------------------------------------------------------------------------

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """See `EngineClient.generate`; by the router if there is one."""
        return await self._client.generate(prompt_ids, num_samples, sampling)

    async def abort(self) -> None:
        """See `EngineClient.abort`; not by a router, which `config/checks.py` sees to."""
        await self._client.abort()

    async def close_requests(self) -> None:
        """See `EngineClient.close_requests`."""
        await self._client.close_requests()

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Waits until it is idle, and no more: its memory is its own."""
        self._client.flush_cache()

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """Nothing: it does not sleep."""

    def begin_update(self) -> None:
        """See `EngineClient.begin_update`."""
        self._sender.add(self._recognised())
        self._client.begin_update()

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Takes part in a broadcast to all engines of this rank, each of which must ask for the same bucket in turn."""
        self._sender.deliver(self._recognised(), named_tensors)

    def end_update(self, version: str) -> None:
        """See `EngineClient.end_update`."""
        self._client.end_update(version)

    def weight_version(self) -> str:
        """See `EngineClient.weight_version`."""
        return self._client.weight_version()

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """See `EngineClient.score`; by this server itself, not by the router."""
        return self._client.score(token_ids)

    def _recognised(self) -> Member:
        if self._member is None:
            raise EngineError(f"engine {self.url}: nobody has waited until it was ready")
        return self._member

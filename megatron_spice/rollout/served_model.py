"""A server with a model of its own, whatever it is, that is asked and never changed: a Challenger that is not trained.

Like `RemoteEngine` it is somebody else's to start, restart and end. Unlike it, it may serve several ranks and others besides,
so it is never asked to be idle, and it need not have the policy's model, only know the ids of the tokenizer that prompts for it
are written with. Another model's ids are other words to it, and it answers them all the same: where no tokenizer was given for
it, its vocabulary must have the size of the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.broadcast import Sender
from megatron_spice.rollout.engine import MEMORY, EngineError, EngineRefused
from megatron_spice.rollout.remote import Expected, RemoteEngine

if TYPE_CHECKING:
    import torch

KEY_VARIABLE = "SPICE_CHALLENGER_KEY"


class ServedModel(RemoteEngine):
    """One such server.

    Args:
        vocab_size: of the tokenizer.
        context: tokens of prompt and completion that it must have room for.
        named, tokenizer_in: what it is called in error messages, and where its tokenizer is given.
        like_policy: ids of `policy.model`'s vocabulary, where its tokenizer is used because none was given; None: one was.
    """

    def __init__(
        self, url: str, config: RolloutConfig, api_key: str, vocab_size: int, context: int, *,
        named: str = "rollout.challenger.engines", tokenizer_in: str = "rollout.challenger.tokenizer", like_policy: int | None = None,
    ) -> None:  # fmt: skip
        self._named = named
        self._tokenizer_in = tokenizer_in
        self._like_policy = like_policy
        alone = config.model_copy(update={"router": None})
        super().__init__(url, alone, api_key, Expected("", vocab_size, context), Sender("cpu"))

    def introduce(self) -> None:
        """Checks that the server is there, wants this key, knows the tokenizer's ids and has room.

        Raises:
            ConfigError: it is not what the recipe says.
        """
        try:
            self._recognise()
        except EngineError as error:
            raise ConfigError(f"{self._named}: {error}") from error

    def _recognise(self) -> None:
        try:
            found = self._client.identity()
        except EngineRefused as error:
            hint = f"is it SGLang, and is its key in the environment variable {KEY_VARIABLE}?"
            raise EngineError(f"engine {self.url}: {hint}\n{error}") from error
        wrong = []
        if self._like_policy is not None and not self._client.has_vocabulary(self._like_policy):
            wrong.append(
                f"it would be asked with the tokenizer of policy.model, which has {self._like_policy} ids, and its vocabulary is of another "
                f"size; give its model's in {self._tokenizer_in}"
            )
        elif not self._client.has_token(self._expected.vocab_size - 1):
            wrong.append(
                f"it does not know token {self._expected.vocab_size - 1} of the tokenizer that it is asked with; give its model's in "
                f"{self._tokenizer_in}"
            )
        if self._config.deterministic and not found.samples_by_seeds:
            wrong.append("rollout.deterministic=true needs it to be started with --enable-deterministic-inference")
        if found.context < self._expected.context:
            wrong.append(f"its context of {found.context} tokens is less than the {self._expected.context} that requests of this run may have")
        if wrong:
            raise EngineError(f"engine {self.url} (it serves {found.model}) cannot be used: {'; '.join(wrong)}")

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Nothing: its accelerators are its own, and others may be using it."""

    def begin_update(self) -> NoReturn:
        """Its weights are not ours to change."""
        raise AssertionError(f"{self.url} is never updated")

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> NoReturn:
        """Its weights are not ours to change."""
        raise AssertionError(f"{self.url} is never updated")

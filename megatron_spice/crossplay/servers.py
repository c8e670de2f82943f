"""Servers that run already: which model they have just now, and which tokenizer they are asked with.

Prompts go to a server as ids. Those of another model's tokenizer are other words to it, or none, and it answers them all the same:
what came of that would look like a weak model. So a tokenizer is given for a server, or it is the server's own, or the recipe's
where the vocabularies have the same size; anything else is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.config.hf import hugging_face_folder, read_architecture
from megatron_spice.config.schema import Config
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.rollout.engine import EngineError, EngineRefused
from megatron_spice.rollout.remote_client import RemoteClient
from megatron_spice.rollout.served_model import KEY_VARIABLE

FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Server:
    """`model`: what it says that it serves, with the version of its weights; `tokenizer` is what it is asked with."""

    model: str
    tokenizer: TextTokenizer


def key() -> str:
    """The key that servers want, "" for none."""
    return os.environ.get(KEY_VARIABLE, "")


def meet(url: str, tokenizer: str, config: Config) -> Server:
    """Asks a server who it is.

    Args:
        tokenizer: folder with its model's tokenizer; "" looks for one: the server's own if its folder is on this machine too, else
            that of `policy.model` if the server's vocabulary has the same size.

    Raises:
        EngineError: there is no answer, or it wants another key.
        ValueError, OSError, ConfigError: there is no tokenizer for it.
    """
    client = RemoteClient(url.rstrip("/"), key(), request_timeout=config.rollout.request_timeout)
    try:
        found = client.identity()
    except EngineRefused as error:
        hint = f"is it SGLang, and is its key in the environment variable {KEY_VARIABLE}?"
        raise EngineError(f"engine {url}: {hint}\n{error}") from error
    folder = _tokenizer(client, url, tokenizer, found.tokenizer, config)
    return Server(f"{found.model}, weights {found.weight_version}", TextTokenizer.from_dir(folder))


def _tokenizer(client: RemoteClient, url: str, given: str, its_own: str, config: Config) -> Path:
    """The folder of the tokenizer."""
    if given or (its_own and (Path(its_own) / FILE).is_file()):
        return Path(given or its_own)
    # What a server refuses is beyond its model's vocabulary, which may be larger than the tokenizer's.
    size = read_architecture(config.policy.model).vocab_size
    if not client.has_vocabulary(size):
        raise ValueError(
            f"{url}: its tokenizer ({its_own or 'of unknown name'}) is not on this machine, and that of policy.model={config.policy.model} "
            f"cannot be its: it has {size} ids, the server's vocabulary another number; give its model's with --tokenizer"
        )
    return hugging_face_folder(config.policy.model)

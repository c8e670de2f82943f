"""The models that meet: checkpoints, each served by an engine of our own while it is its turn, and servers that run already."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import hugging_face_folder
from megatron_spice.config.schema import Config
from megatron_spice.convert.stamp import stamp
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.rollout.engine import Engine
from megatron_spice.rollout.served_model import KEY_VARIABLE, ServedModel
from megatron_spice.rollout.supervisor import SglangEngine

MODELS = "models"


@dataclass(frozen=True, slots=True)
class Player:
    """A model by its name in the results; `source` is a checkpoint's folder or a server's URL."""

    name: str
    source: str

    @property
    def is_url(self) -> bool:
        """Whether it is served already."""
        return self.source.startswith(("http://", "https://"))

    @property
    def identity(self) -> str:
        """What results belong to: a server's URL, or where a checkpoint is and which files it has. The folder must be there."""
        return self.source if self.is_url else f"{(path := Path(self.source)).resolve()} {stamp(path)}"


def players(text: str) -> list[Player]:
    """From `NAME=SOURCE,SOURCE,...`; without a name, a checkpoint is called by the last two parts of its path, a server by its
    address.

    Raises:
        ValueError: two have the same name, or one has a name that no file can have.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        named = re.match(r"([\w.+-]+)=(.+)", part)
        last = part.rstrip("/").split("/")[-1 if "://" in part else -2 :]
        name, source = named.groups() if named else ("-".join(last), part)
        name = re.sub(r"[^\w.+-]", "_", name)
        found.append(Player(name, source))
    names = [player.name for player in found]
    if not found:
        raise ValueError(f"{text!r} names no model; give checkpoints or URLs, separated by commas, as in early=runs/a/checkpoints/...")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name}; name them: one={found[names.index(name)].source},...")
    return found


def check(player: Player) -> None:
    """Whether a player is there, as far as can be told before anything starts.

    Raises:
        ValueError: it is not; the message names it.
    """
    if player.is_url:
        return
    try:
        hugging_face_folder(Path(player.source))
    except ConfigError:
        found = "holds no model" if Path(player.source).exists() else "is not there"
        raise ValueError(f"{player.name}: {player.source} {found}; give a Hugging Face folder, a checkpoint or a URL") from None


@contextmanager
def served(player: Player, config: Config, folder: Path, device: str) -> Iterator[tuple[Engine, TextTokenizer]]:
    """The player's engine, up and idle, and the tokenizer that it is asked with; an engine of our own is ended afterwards.

    Args:
        folder: of the results; checkpoints are written there as Hugging Face folders, logs too.

    Raises:
        EngineError, ConfigError: it does not come up, or is not what it should be.
        ValueError: the checkpoint cannot be read.
    """
    if player.is_url:
        tokenizer = TextTokenizer.from_dir(config.rollout.challenger.tokenizer or hugging_face_folder(config.policy.model))
        context = config.rollout.context_length or config.game.challenger_max_tokens + 1
        server = ServedModel(player.source, config.rollout, os.environ.get(KEY_VARIABLE, ""), tokenizer.vocab_size, context)
        server.introduce()
        yield server, tokenizer
        return
    from megatron_spice.convert.hf_form import hugging_face_form

    (folder / MODELS).mkdir(parents=True, exist_ok=True)
    model = hugging_face_form(Path(player.source), folder / MODELS / player.name)
    log = folder / "logs" / f"{player.name}.log"
    engine = SglangEngine(config.rollout, Topology(device=device), config.policy.precision, model, log, load_format="auto")
    engine.launch()
    try:
        engine.wait_ready()
        yield engine, TextTokenizer.from_dir(model)
    finally:
        engine.close()

"""The models that meet: checkpoints, each served by an engine of our own while it is its turn, and servers that run already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_spice.cluster.topology import Topology
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import hugging_face_folder
from megatron_spice.config.schema import Config
from megatron_spice.convert.stamp import stamp
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.crossplay import servers
from megatron_spice.rollout.engine import Engine
from megatron_spice.rollout.served_model import ServedModel
from megatron_spice.rollout.supervisor import SglangEngine

MODELS = "models"


@dataclass(frozen=True, slots=True)
class Player:
    """A model by its name in the results; `source` is a checkpoint's folder or a server's URL, `tokenizer` the folder of a server's
    tokenizer, "" if none was given (`servers.meet`)."""

    name: str
    source: str
    tokenizer: str = ""

    @property
    def is_url(self) -> bool:
        """Whether it is served already."""
        return self.source.startswith(("http://", "https://"))

    def identity(self, config: Config) -> str:
        """What results belong to: where a checkpoint is and which files it has, or a server's URL, which model and weights it says
        that it serves just now, and what it is asked with. The folder, or the server, must be there.

        Raises:
            EngineError, ValueError, ConfigError: see `servers.meet`.
        """
        if not self.is_url:
            return f"{(path := Path(self.source)).resolve()} {stamp(path)}"
        server = servers.meet(self.source, self.tokenizer, config)
        return f"{self.source} ({server.model}, tokenizer {server.tokenizer.vocab_hash[:12]})"

    def is_at(self, identity: str) -> bool:
        """Whether it is a server, and this the identity of what it serves, or has served."""
        return self.is_url and identity.startswith(f"{self.source} (")


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


def with_tokenizers(everyone: Sequence[Player], given: Sequence[str]) -> list[Player]:
    """The players, each with its tokenizer of `given`, which are spelled `NAME=FOLDER`.

    Raises:
        ValueError: nobody has that name.
    """
    folders = {}
    for each in given:
        name, _, folders[name] = each.partition("=")
        if name not in [player.name for player in everyone] or not folders[name]:
            names = ", ".join(dict.fromkeys(player.name for player in everyone))
            raise ValueError(f"--tokenizer {each}: give NAME=FOLDER, where NAME is one of {names}")
    return [replace(player, tokenizer=folders.get(player.name, "")) for player in everyone]


def check(player: Player) -> None:
    """Whether a player, and the tokenizer given for it, are there, as far as can be told before anything starts.

    Raises:
        ValueError: they are not; the message names it.
    """
    if player.tokenizer and not player.is_url:
        raise ValueError(f"{player.name}: {player.source} has its own tokenizer; --tokenizer is for servers")
    if player.tokenizer and not (Path(player.tokenizer) / servers.FILE).is_file():
        raise ValueError(f"{player.name}: its tokenizer {player.tokenizer} has no {servers.FILE}; give the folder of a Hugging Face model")
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
        tokenizer = servers.meet(player.source, player.tokenizer, config).tokenizer
        context = config.rollout.context_length or config.game.challenger_max_tokens + 1
        server = ServedModel(
            player.source, config.rollout, servers.key(), tokenizer.vocab_size, context, named=player.name, tokenizer_in="--tokenizer"
        )
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

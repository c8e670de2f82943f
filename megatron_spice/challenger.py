"""Who writes the tasks when the policy does not: the model that training began with, or servers with another one. And whether the
Challenger's longest request fits, whoever it is.

The paper's *Fixed Challenger* keeps the initial weights throughout, so leaving its trajectories out of the update is not enough:
the shared weights move with the Reasoner. Each of the run's engines therefore gets a second one beside it. On a CPU that is one
more server with the initial weights from disk; on an accelerator, where it would take the memory of the first, the initial
model is served elsewhere and named in `rollout.challenger.engines`, as the *Strong Challenger* is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_spice.checkpoint import store
from megatron_spice.cluster.topology import Topology
from megatron_spice.config.checks import NO_SECOND_ENGINE
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import read_architecture
from megatron_spice.config.schema import Config, GameConfig
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.game.play import Wording
from megatron_spice.game.records import Passage
from megatron_spice.rollout.engine import Engine
from megatron_spice.rollout.served_model import KEY_VARIABLE, ServedModel
from megatron_spice.rollout.supervisor import SglangEngine

INITIAL = "initial_model"
"""Folder of a run: the Hugging Face form of the weights that it began with."""
BESIDE_SEED = 15485863
"""Between the seeds of an engine and of the one beside it, which has the same weights at first and must not draw the same. (A prime,
and not one of those between the seeds of runs and of attempts in `assemble.py`.)"""


def wording(config: Config, tokenizer: TextTokenizer) -> Wording | None:
    """How the Challenger is spoken to; None: like the Reasoner.

    Raises:
        ConfigError: the tokenizer of `rollout.challenger.tokenizer` cannot be used, or has no chat format where the style needs one.
    """
    told = config.rollout.challenger
    if not told.engines:
        return None
    try:
        if told.tokenizer is not None:
            tokenizer = TextTokenizer.from_dir(told.tokenizer)
        return Wording.of(told.prompt_style or config.game.prompt_style, tokenizer)
    except (ValueError, OSError) as error:
        named = told.tokenizer or f"null (policy.model={config.policy.model})"
        raise ConfigError(f"rollout.challenger.tokenizer={named}: {error}") from error


def engines_beside(
    config: Config, topology: Topology, numbers: Sequence[int], tokenizer: TextTokenizer, is_ending: Callable[[], bool]
) -> list[Engine]:
    """An engine for each of this rank's, which have these numbers among all of the run's. A collective of all ranks.

    Raises:
        ConfigError: on all ranks together; a server is not there, cannot be used, or has a context that is shorter than the
            longest request (`context_needed`), or the initial weights cannot be written.
    """
    urls = config.rollout.challenger.engines
    if not urls and topology.device == "cuda":
        raise ConfigError(NO_SECOND_ENGINE)
    if not urls:
        return _colocated(config, topology, numbers, _initial_model(config, topology), is_ending)
    told = config.rollout.challenger.tokenizer
    vocabulary = (TextTokenizer.from_dir(told) if told else tokenizer).vocab_size
    like_policy = None if told else read_architecture(config.policy.model).vocab_size
    asked = wording(config, tokenizer)
    assert asked is not None
    context = context_needed(config.game, asked, 0 if config.game.no_corpus else longest_passage(config.corpus.path))
    key = os.environ.get(KEY_VARIABLE, "")
    found = [
        ServedModel(urls[number % len(urls)], config.rollout, key, vocabulary, context, like_policy=like_policy) for number in numbers
    ]
    problems: list[str] = []
    for engine in found:
        try:
            engine.introduce()
        except ConfigError as error:
            problems += error.problems
    _raise_together(problems)
    return found


def context_needed(game: GameConfig, asked: Wording, longest: int) -> int:
    """Tokens that the Challenger's longest request may have: instructions, a passage of `longest` tokens, and the completion. The
    passage is counted as the corpus's tokenizer does, of which another model's may make more."""
    bare = None if game.no_corpus else Passage(0, 0, "", (), "")
    prompts = [(asked.style.challenger_prompt(bare, kind), game.challenger_max_tokens) for kind in game.answer_types]
    if bare is not None and game.format_selection == "model" and len(game.answer_types) > 1:
        prompts += [(prompt, game.selection_max_tokens) for prompt in [asked.style.selection_prompt(bare)] if prompt is not None]
    return longest + max(len(asked.tokenizer.encode_prompt(prompt)) + limit for prompt, limit in prompts)


def check_context(config: Config, asked: Wording, context: int) -> None:
    """Whether the Challenger's longest request fits; an engine refuses one that does not, in the middle of an iteration.

    Raises:
        ConfigError: it does not; with the numbers.
    """
    longest = 0 if config.game.no_corpus else longest_passage(config.corpus.path)
    needed = context_needed(config.game, asked, longest)
    if needed > context:
        raise ConfigError(
            f"the Challenger's longest request has {needed} tokens (passages of up to {longest}, game.challenger_max_tokens="
            f"{config.game.challenger_max_tokens} and {needed - longest - config.game.challenger_max_tokens} of instructions), the context "
            f"{context}; raise rollout.context_length as far as the model allows, or cut the corpus with a smaller --max-tokens"
        )


def longest_passage(corpus: Path) -> int:
    """Tokens of a corpus's longest passage by its description; 0 where that does not say."""
    longest = Manifest.read(corpus).options.get("max_tokens", 0)
    return longest if isinstance(longest, int) else 0


def _colocated(
    config: Config, topology: Topology, numbers: Sequence[int], model: Path, is_ending: Callable[[], bool]
) -> list[Engine]:
    made: list[Engine] = []
    for number in numbers:
        rollout = config.rollout.model_copy(update={"seed": (config.rollout.seed + BESIDE_SEED) % 2**31})
        log_path = config.run.dir / "logs" / f"engine_challenger_{number}.log"
        precision = config.policy.precision
        made.append(SglangEngine(rollout, topology, precision, model, log_path, load_format="auto", is_ending=is_ending))
    return made


def _initial_model(config: Config, topology: Topology) -> Path:
    """The Hugging Face folder of `policy.model`, written into the run's folder if it is a Megatron checkpoint,
    and written anew if what is there was made of another."""
    model, folder = config.policy.model, config.run.dir / INITIAL
    if not store.is_megatron(model):
        return model
    problems: list[str] = []
    if topology.is_first:
        from megatron_spice.convert.hf_form import hugging_face_form

        try:
            hugging_face_form(model, folder)
        except (ValueError, OSError) as error:
            problems.append(f"game.fixed_challenger=true needs policy.model={model} as a Hugging Face folder: {error}")
    _raise_together(problems)
    return folder


def _raise_together(problems: list[str]) -> None:
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    if found := [problem for each in everyone for problem in each]:
        raise ConfigError(list(dict.fromkeys(found)))

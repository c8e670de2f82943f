"""What is evaluated: a checkpoint served by an engine of our own, a server that runs already, or any OpenAI endpoint.

Each is asked in the words of training (`game/prompts*.py`). Where there is a tokenizer here, prompts go as ids, as in training;
without one, only as text.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_spice.config.schema import RolloutConfig
from megatron_spice.evaluation.context import context_of
from megatron_spice.evaluation.endpoint import Endpoint, TooLong, is_too_long
from megatron_spice.game.prompts import PromptStyle
from megatron_spice.game.prompts_chat import SYSTEM
from megatron_spice.game.records import Completion, Generator, Prompt, Sampling, Task
from megatron_spice.game.styles import style_for
from megatron_spice.rollout.engine import Engine, EngineError, EngineRefused

LEAST_ROOM = 8
"""Tokens that must be left of the context for an answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `finish` "length": it was cut, and `lacked_room` where the model's context ended, before it had the tokens that it
    might have. `tokens` None: the server does not say."""

    text: str
    finish: str
    tokens: int | None
    lacked_room: bool = False


class Model(Protocol):
    """What answers tasks."""

    style: PromptStyle

    async def answer(self, task: Task, samples: int, temperature: float, max_tokens: int) -> list[Reply]:
        """`samples` answers to one question.

        Raises:
            EngineError, EndpointError: the server failed.
            TooLong: the question does not fit the model's context.
        """


class EngineModel:
    """An SGLang engine, ours or not, that gets ids.

    Args:
        context: its longest prompt plus answer, None if that is not known.
        watch: raises when the engine has died or hangs, and never ends otherwise.
    """

    def __init__(
        self, engine: Generator, tokenizer: Any, style: str, context: int | None, watch: asyncio.Task[None] | None = None
    ) -> None:
        self.style = style_for(style, tokenizer)
        self._watch = watch
        self._engine = engine
        self._tokenizer = tokenizer
        self._context = context

    async def answer(self, task: Task, samples: int, temperature: float, max_tokens: int) -> list[Reply]:
        """See `Model.answer`."""
        ids, wanted = self._tokenizer.encode_prompt(self.style.reasoner_prompt(task)), max_tokens
        if self._context is not None:
            room = self._context - len(ids) - 1
            if room < LEAST_ROOM:
                raise TooLong(f"a question of {len(ids)} tokens does not fit the model's context of {self._context}: {task.question!r:.80}")
            max_tokens = min(max_tokens, room)
        sampling = Sampling(temperature, max_tokens, stop=self.style.reasoner_stop)
        try:
            completions = await self._unless_it_dies(self._engine.generate(ids, samples, sampling))
        except EngineRefused as error:
            if is_too_long(error.status, error.said):
                raise TooLong(str(error)) from error
            raise
        found = ((each, len(each.completion_ids)) for each in completions)
        return [Reply(each.text, each.finish, tokens, each.finish == "length" and tokens < wanted) for each, tokens in found]

    async def _unless_it_dies(self, asking: Coroutine[Any, Any, list[Completion]]) -> list[Completion]:
        """What is asked for, or the watch's error as soon as there is one."""
        task = asyncio.ensure_future(asking)
        try:
            await asyncio.wait({task, self._watch} if self._watch else {task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._watch.result()
            return await task
        finally:
            task.cancel()


class EndpointModel:
    """A server of OpenAI's interface: a conversation for style `chat`, a text to go on from for `few_shot`.

    Such servers refuse a question whose longest answer would not fit, even where the question does, and how many tokens it has
    is not known here. So it is asked again with half the room, and half of that, before it counts as too long.
    """

    def __init__(self, endpoint: Endpoint, style: str) -> None:
        self.style = style_for(style, _NoTemplate())
        self._endpoint = endpoint

    async def answer(self, task: Task, samples: int, temperature: float, max_tokens: int) -> list[Reply]:
        """See `Model.answer`."""
        room = max_tokens
        while True:
            try:
                found = await self._answer(task, samples, temperature, room)
                is_less = (min(room, each.tokens or room) < max_tokens for each in found)
                return [replace(each, lacked_room=less and each.finish == "length") for each, less in zip(found, is_less)]
            except TooLong:
                room //= 2
                if room < LEAST_ROOM:
                    raise

    async def _answer(self, task: Task, samples: int, temperature: float, max_tokens: int) -> list[Reply]:
        settings = {"temperature": temperature, "max_tokens": max_tokens}
        if self.style.reasoner_stop:
            settings["stop"] = list(self.style.reasoner_stop)
        text = _text(self.style.reasoner_prompt(task))
        if self.style.name == "chat":
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            found = await self._endpoint.chat(messages, samples, **settings)
        else:
            found = await self._endpoint.complete(text, samples, **settings)
        return [Reply(each["text"], each["finish"], each["tokens"]) for each in found]


class _NoTemplate:
    """Stands for a tokenizer whose chat template the server applies."""

    def chat_wrapper(self, system: str | None) -> tuple[str, str]:
        return "", ""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        raise NotImplementedError("an endpoint gets text")


def _text(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt)


def is_url(source: str) -> bool:
    """Whether a model is named by the address of a server."""
    return source.startswith(("http://", "https://"))


async def served_by(url: str, key: str, name: str) -> tuple[dict[str, str], int | None]:
    """What a server says that it serves under a name, "" for the first that it lists, and its context (`Endpoint.about`).

    Raises:
        EndpointError: it does not answer, or the key is wrong.
    """
    async with Endpoint(url, key, name, timeout=60.0) as endpoint:
        return await endpoint.about()


def context_of_checkpoint(checkpoint: Path, hf: Path | None, config: RolloutConfig) -> int | None:
    """The context that `serve` will give what `export` makes of a checkpoint; None if that is not said."""
    about = next((folder for folder in (checkpoint, hf, checkpoint / "hf") if folder and (folder / "config.json").is_file()), checkpoint)
    return context_of(about, config, _device() == "cpu")


def _device() -> Literal["cpu", "cuda"]:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@asynccontextmanager
async def open_endpoint(url: str, key: str, name: str, style: str, tokenizer: Path | None, timeout: float) -> AsyncIterator[Model]:
    """A server that runs already: SGLang's own interface where `tokenizer` (a Hugging Face folder) is given, else OpenAI's."""
    if tokenizer is None:
        async with Endpoint(url, key, name, timeout=timeout) as endpoint:
            yield EndpointModel(endpoint, style)
        return
    from megatron_spice.corpus.tokenizer import TextTokenizer
    from megatron_spice.rollout.remote_client import RemoteClient

    client = RemoteClient(url.rstrip("/").removesuffix("/v1"), key, request_timeout=timeout)
    context = client.identity().context
    try:
        yield EngineModel(client, TextTokenizer.from_dir(tokenizer), style, context)
    finally:
        await client.close_requests()


@asynccontextmanager
async def serve(folder: Path, style: str, config: RolloutConfig, log: Path) -> AsyncIterator[Model]:
    """A Hugging Face folder served by an SGLang engine of our own, which is ended afterwards.

    Raises:
        EngineError: it does not come up; with the end of its log.
    """
    from megatron_spice.cluster.topology import Topology
    from megatron_spice.corpus.tokenizer import TextTokenizer
    from megatron_spice.rollout.supervisor import SglangEngine

    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    precision = "fp32" if (about.get("dtype") or about.get("torch_dtype")) == "float32" else "bf16"
    topology = Topology(device=_device())
    context = context_of(folder, config, topology.device == "cpu")
    tokenizer = TextTokenizer.from_dir(folder)
    style_for(style, tokenizer)  # a model without chat template is told so before anything starts
    engine = SglangEngine(config, topology, precision, folder, log, load_format="auto")
    engine.launch()
    watch: asyncio.Task[None] | None = None
    try:
        await asyncio.to_thread(engine.wait_ready)
        watch = asyncio.create_task(_watch(engine))
        yield EngineModel(engine, tokenizer, style, context, watch)
    finally:
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError, EngineError):
                await watch
        await engine.close_requests()
        engine.close()


async def _watch(engine: Engine) -> None:
    while True:
        engine.check()
        await asyncio.sleep(1.0)


def check(checkpoint: Path, hf: Path | None) -> None:
    """Raises ValueError, FileNotFoundError or ConfigError where a folder is no checkpoint, or not a whole one."""
    from megatron_spice.convert.find import open_source  # loads torch

    open_source(checkpoint, hf)


def export(checkpoint: Path, hf: Path | None, target: Path, is_stopped: Callable[[], bool] = lambda: False) -> Path:
    """A Hugging Face folder of a checkpoint: itself if it is one, else made as `target` (which is kept if it is there).

    Raises:
        ValueError, FileNotFoundError, ConfigError: it is no checkpoint, or not a whole one.
        RuntimeError: `is_stopped` said so while it was made; the next export of the checkpoint goes on from there.
    """
    from megatron_spice.convert.find import open_source
    from megatron_spice.convert.hf_target import HFTarget
    from megatron_spice.convert.job import convert

    source = open_source(checkpoint, hf)
    if (checkpoint / "config.json").is_file():
        return checkpoint
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(source, HFTarget(source), target, {"command": "evaluate"}, processes=2, label="export", is_stopped=is_stopped)
    return target


def discard(target: Path) -> None:
    """Removes what `export` made."""
    shutil.rmtree(target, ignore_errors=True)

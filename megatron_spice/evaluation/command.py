"""The command `tools/evaluate.py MODEL --tasks ...`: its options, in the order in which they are checked, and the run itself.

Everything that can be wrong with the questions is found before the model is exported and served, which takes its time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_spice import __version__
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import RolloutConfig, VerifierConfig
from megatron_spice.convert.stamp import stamp
from megatron_spice.evaluation import model as models
from megatron_spice.evaluation import sources, table
from megatron_spice.evaluation.context import drop_outgrown
from megatron_spice.evaluation.endpoint import Endpoint, EndpointError
from megatron_spice.evaluation.items import Item
from megatron_spice.evaluation.judge import Judge
from megatron_spice.evaluation.log import FORMAT, TaskLog
from megatron_spice.evaluation.run import Evaluator, Result
from megatron_spice.evaluation.tasks import Benchmark, find_all
from megatron_spice.game.verify import Verifier

KEY_VARIABLE = "SPICE_ENGINE_KEY"
JUDGE_KEY_VARIABLE = "SPICE_JUDGE_KEY"
MAX_TOKENS = {"chat": 4096, "few_shot": 32}
# One model and nothing beside it: more cache than in training, and answers may be long.
ENGINE = {"max_total_tokens": 32768, "request_timeout": 3600.0, "memory_fraction": 0.8}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="checkpoint of a run, Megatron or Hugging Face folder, or http(s):// of a server")
    parser.add_argument("--tasks", required=True, help="comma-separated names; `paper`: all eleven; tools/evaluate.py tasks lists them")
    parser.add_argument("--data", action="append", default=[], metavar="TASK=PATH|FOLDER", help="where a task's rows are, or a folder of them by name")
    parser.add_argument("--map", action="append", default=[], metavar="[TASK.]MEANING=FIELD", help="a field's name, such as question=problem")
    parser.add_argument("--split", default="test", help="of data sets with several [%(default)s]")
    parser.add_argument("--limit", type=positive, help="only so many questions of each task, the first ones; may be raised later")
    parser.add_argument("--recipe", type=Path, help="take prompt style, longest answer and verifier from a training recipe")
    parser.add_argument("--style", choices=["chat", "few_shot"], help="prompts [the recipe's, else chat]")
    parser.add_argument("--max-tokens", type=positive, help="longest answer [the recipe's, else 4096 for chat, 32 for few_shot]")
    parser.add_argument("--samples", type=positive, help="answers a question, instead of the task's own number")
    parser.add_argument("--temperature", type=not_negative, help="instead of the task's own")
    parser.add_argument("--output", type=Path, help="folder for logs and results [runs/evaluations/NAME-OF-MODEL, of a server its address and --served-name]")
    parser.add_argument("--hf", type=Path, help="Hugging Face folder with config.json and tokenizer, for checkpoints without")
    parser.add_argument("--engine", action="append", default=[], metavar="KEY=VALUE", help="a setting of `rollout`, such as tensor_parallel_size=2")
    parser.add_argument("--in-flight", type=positive, default=64, help="questions asked at a time [%(default)s]")
    parser.add_argument("--served-name", default="", help="the model's name at a server [the first it lists]")
    parser.add_argument("--tokenizer", type=Path, help="for an SGLang server: Hugging Face folder; prompts then go as ids, as in training")
    parser.add_argument("--judge", metavar="URL", help=f"OpenAI-compatible server that judges mathematics, answers in the log too; its key in {JUDGE_KEY_VARIABLE}")
    parser.add_argument("--judge-model", default="", help="the judge's name there [the first it lists]")


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def not_negative(text: str) -> float:
    """A number of 0 or more, for argparse."""
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a temperature")
    return value


class Plan:
    """What is to be done, checked as far as can be without the model.

    Raises:
        ValueError, FileNotFoundError, ConfigError: an option, a file or a row is wrong.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.style, self.max_tokens, self.verifier = options.style or "chat", options.max_tokens, VerifierConfig(workers=2)
        if options.recipe is not None:
            game = load_config(options.recipe).game
            self.style = options.style or game.prompt_style
            self.max_tokens = options.max_tokens or game.reasoner_max_tokens
            self.verifier = game.verifier
        self.max_tokens = self.max_tokens or MAX_TOKENS[self.style]
        self.engine = _engine(options.engine)
        self.source = options.model
        self.is_served = models.is_url(self.source)
        if not self.is_served:
            if not Path(self.source).is_dir():
                raise FileNotFoundError(f"{self.source} is neither a folder nor an address that begins with http:// or https://")
            self.source = str(Path(self.source).resolve())
        name = name_of(self.source, options.served_name if self.is_served else "", self.is_served and options.tokenizer is not None)
        self.folder = options.output or Path("runs/evaluations") / name
        self.tasks: list[tuple[Benchmark, list[Item]]] = []
        for benchmark in find_all(options.tasks):
            items = sources.load(sources.request_for(benchmark, options.data, options.map), options.split, options.limit)
            self.tasks.append((_asked(benchmark, options), items))
        self.weights = ""
        self.context: int | None = None  # the model's; a server's when it has been asked
        if not self.is_served:
            models.check(Path(self.source), options.hf)
            self.weights = stamp(Path(self.source))
            self.context = models.context_of_checkpoint(Path(self.source), options.hf, self.engine)

    @property
    def exported(self) -> Path:
        """Where the source's Hugging Face form is made. Each source has its own, so that what an interrupted evaluation of one
        left behind is not served as another."""
        key = json.dumps([self.source, self.weights, self.options.hf and str(self.options.hf.resolve())])
        return self.folder / f"exported-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @property
    def judge(self) -> dict[str, str] | None:
        """Who judges beside the rules, for the results."""
        return {"url": self.options.judge, "model": self.options.judge_model} if self.options.judge else None

    def about(self, serves: dict[str, str] | None) -> dict[str, Any]:
        """What decides the answers, but for the task and its questions. Behind an address there may be one model today and another
        tomorrow, so it takes what was asked for there, and what the server `serves` (None: not known)."""
        about = {"model": self.source, "weights": self.weights, "style": self.style, "max_tokens": self.max_tokens, "version": __version__}
        if self.is_served:
            tokenizer = self.options.tokenizer and str(self.options.tokenizer.resolve())
            about |= {"served_name": self.options.served_name, "tokenizer": tokenizer or "", "serves": serves}
        return about

    def header(self, benchmark: Benchmark, serves: dict[str, str] | None) -> dict[str, Any]:
        """The first line of a task's log."""
        task = {"task": benchmark.name, "samples": benchmark.samples, "temperature": benchmark.temperature}
        return {"format": FORMAT, **task, **self.about(serves)}

    def log_of(self, benchmark: Benchmark) -> Path:
        """The file of a task's log."""
        return self.folder / f"{benchmark.name.replace('/', '-')}.jsonl"


def _engine(settings: list[str]) -> RolloutConfig:
    given = dict(ENGINE)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in RolloutConfig.model_fields:
            raise ValueError(f"--engine {setting}: expected KEY=VALUE with a setting of `rollout` ({', '.join(RolloutConfig.model_fields)})")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    try:
        return RolloutConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--engine {first['loc'][0]}={first['input']!r}: {first['msg']}") from None


def _asked(benchmark: Benchmark, options: argparse.Namespace) -> Benchmark:
    """A benchmark with the decoding that was given by hand."""
    samples = options.samples or benchmark.samples
    temperature = benchmark.temperature if options.temperature is None else options.temperature
    if samples > 1 and temperature == 0:
        raise ValueError(f"{benchmark.name}: --samples {samples} of greedy decoding are all the same; give --temperature too")
    return replace(benchmark, samples=samples, temperature=temperature)


def name_of(source: str, served_name: str = "", by_ids: bool = False) -> str:
    """A folder's name for a model: the last two parts of its path, but for a run's `checkpoints`; or its address, with the name that
    was asked for there, and a word where prompts go as ids."""
    parts = [part for part in source.split("://")[-1].replace(":", "-").split("/") if part not in ("", "v1", "checkpoints")]
    served = [re.sub(r"[^\w.]+", "-", served_name)] if served_name else []
    return "-".join([*parts[-2:], *served, *(["ids"] if by_ids else [])])


async def evaluate(plan: Plan) -> list[Result]:
    """Runs a plan: opens the logs, the judge, the verifier and the model, then task after task.

    Raises:
        ValueError: a log was begun otherwise.
        EngineError, EndpointError: a server failed.
    """
    serves, silence = await _serves(plan)
    logs: list[TaskLog] = []
    results: list[Result] = []
    try:
        for benchmark, items in plan.tasks:
            logs.append(TaskLog(plan.log_of(benchmark), plan.header(benchmark, serves)))
            logs[-1].expect(item.as_json() for item in items)
            if again := drop_outgrown(benchmark, logs[-1], plan.context):
                what = f"{len(again)} questions are asked again: they or their answers did not fit"
                _say(f"{benchmark.name}: {what}, and the context has {plan.context} tokens now")
        missing = [sum(item.id not in log.done for item in items) for (_, items), log in zip(plan.tasks, logs, strict=True)]
        if silence is not None and any(missing):
            raise silence
        for (benchmark, items), log, count in zip(plan.tasks, logs, missing, strict=True):
            if not count:
                _say(f"{benchmark.name}: all answers, to {len(items)} questions, are from {log.path}; the model is not asked")
        async with AsyncExitStack() as stack:
            judge = await _judge(plan, stack)
            evaluator = await _evaluator(plan, stack, judge) if any(missing) else Evaluator(None, None, judge, progress=_progress)
            for (benchmark, items), log in zip(plan.tasks, logs, strict=True):
                results.append(await evaluator.run(benchmark, items, log))
    finally:
        for log in logs:
            log.close()
    models.discard(plan.exported)
    table.write(plan.folder, {**plan.about(serves), "judge": plan.judge}, results)
    return results


async def _serves(plan: Plan) -> tuple[dict[str, str] | None, EndpointError | None]:
    """What a server says it serves; its context goes to the plan. One that does not answer is an error only where something is to be
    asked: if all that is wanted has a log, that error is returned, to be raised if the log turns out not to have everything."""
    if not plan.is_served:
        return None, None
    try:
        serves, plan.context = await models.served_by(plan.source, os.environ.get(KEY_VARIABLE, ""), plan.options.served_name)
        return serves, None
    except EndpointError as error:
        if not all(path.exists() and path.stat().st_size for path in (plan.log_of(benchmark) for benchmark, _ in plan.tasks)):
            raise
        _say(f"{error}\nevaluate: whether it still serves what the logs are of cannot be told")
        return None, error


async def _judge(plan: Plan, stack: AsyncExitStack) -> Judge | None:
    if not plan.options.judge:
        return None
    key = os.environ.get(JUDGE_KEY_VARIABLE, "")
    return Judge(await stack.enter_async_context(Endpoint(plan.options.judge, key, plan.options.judge_model)))


async def _evaluator(plan: Plan, stack: AsyncExitStack, judge: Judge | None) -> Evaluator:
    verifier = await stack.enter_async_context(Verifier(plan.verifier))
    model = await stack.enter_async_context(_model(plan))
    return Evaluator(model, verifier, judge, plan.max_tokens, plan.options.in_flight, _progress, plan.context)


def _say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)


@asynccontextmanager
async def _model(plan: Plan) -> AsyncIterator[models.Model]:
    options = plan.options
    if models.is_url(plan.source):
        key = os.environ.get(KEY_VARIABLE, "")
        opened = models.open_endpoint(plan.source, key, options.served_name, plan.style, options.tokenizer, plan.engine.request_timeout)
    else:
        folder = await _export(plan)
        opened = models.serve(folder, plan.style, plan.engine, plan.folder / "engine.log")
    async with opened as model:
        yield model


async def _export(plan: Plan) -> Path:
    """In a thread of its own: signals are the event loop's to handle, which must not stand still for the minutes that this may
    take. A thread cannot be cancelled, and the command would wait for it: it looks whether it is still wanted. None of an
    executor's: the processes that it forks would wait for an executor's threads at their end, and be the thread themselves."""
    unwanted = threading.Event()
    exported: Future[Path] = Future()
    exported.set_running_or_notify_cancel()

    def work() -> None:
        try:
            exported.set_result(models.export(Path(plan.source), plan.options.hf, plan.exported, unwanted.is_set))
        except BaseException as error:
            exported.set_exception(error)

    thread = threading.Thread(target=work, name="export")
    thread.start()
    try:
        return await asyncio.wrap_future(exported)
    except asyncio.CancelledError:
        unwanted.set()
        thread.join()
        raise


def _progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{name}: {done} of {total} questions", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done == 0:
        print(f"{name}: {done} of {total} questions", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """The command. Exit code 0, or 130 when it was stopped; errors are the caller's to print."""
    plan = Plan(options)

    async def stoppable() -> list[Result]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await evaluate(plan)

    try:
        results = asyncio.run(stoppable())
    except asyncio.CancelledError:
        print("\nevaluate: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(table.table(results))
    print(f"{plan.folder / table.RESULTS}; each answer is in the *.jsonl beside it", file=sys.stderr)
    return 0

"""`tools/benchmark.py rollout`: how long engines have nothing to do while there is work for them.

Real SGLang servers, one on each of `--engines` ranks of gloo, play passages through the rollout pool: the game itself, with
its verifier, on texts of random words. Passages are uneven on purpose: texts of 20 to 300 words, 8 to 64 attempts, Challenger
limits of 8 to 96 tokens and Reasoner limits of 4 to 48, each drawn from a distribution with a long tail (uniform in its
logarithm).

An engine is idle while none of its requests is running although work remains for it: a passage that nobody has claimed, or
one of its own that has not ended. Both are true from the start until its last passage ends, because its host claims a
passage as soon as there is room. The share is of that time, and the moments between a reply and the next request are in it.
What follows until the last engine has ended, the tail, is shown beside it: a passage is played by one engine, so there is
nothing left to take. The processor time of the busiest process of the server says whether a server with a request did work.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_options import columns, need_model_folder, positive

from megatron_spice import machine

HELP = "engines that play uneven passages, and how long they have nothing to do"
WORDS = (
    "the river lake export gold cocoa capital population area coast border island mountain north south east west of and in "
    "is was 12 1957 380 per cent million people trade port railway import oil gas coffee language religion president law"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--engines", type=positive, default=2, help="engines, each on a rank of its own (default 2)")
    parser.add_argument("--passages", type=positive, default=16, help="passages of a round (default 16)")
    parser.add_argument("--rounds", type=positive, default=3, help="default 3")
    parser.add_argument("--in-flight", type=positive, default=4, help="rollout.passages_in_flight (default 4)")
    parser.add_argument("--most-tokens", type=positive, default=96, help="longest Challenger completion (default 96)")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One; ends with a message when there is no model."""
    need_model_folder(options.model)
    return [{
        "title": f"{options.engines} engines", "ranks": options.engines, "device": machine.device("auto"),
        "threads": options.threads or max(1, machine.usable_cores() // options.engines),
        **{key: getattr(options, key) for key in ("model", "passages", "rounds", "in_flight", "most_tokens", "seed")},
    }]  # fmt: skip


class Watched:
    """An engine whose `generate` is watched: how long at least one request of it was running.

    Args:
        engine: the engine; all its other verbs are its own.
        clock: gives seconds.
    """

    def __init__(self, engine: Any, clock: Any = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._running = 0
        self.busy, self.requests = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, *arguments: Any) -> Any:
        """See `Engine.generate`."""
        self.requests += 1
        self._running += 1
        if self._running == 1:
            self._began = self._clock()
        try:
            return await self._engine.generate(*arguments)
        finally:
            self._running -= 1
            if self._running == 0:
                self.busy += self._clock() - self._began


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Hosts one engine on this rank; the first writes what all measured."""
    from megatron_spice.cluster import distributed, platform, topology

    here = topology.from_environment(platform.prepare(job["device"]))
    with distributed.process_group(here, 600) as store, tempfile.TemporaryDirectory() as folder:
        measured = _measure(job, here, store, Path(folder))
    if here.is_first:
        result.write_text(json.dumps(measured))


def _measure(job: dict[str, Any], here: Any, store: Any, folder: Path) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_spice.config.schema import GameConfig, RolloutConfig
    from megatron_spice.corpus.tokenizer import TextTokenizer
    from megatron_spice.game.carried import new_games
    from megatron_spice.game.play import play_passage
    from megatron_spice.game.records import Passage
    from megatron_spice.game.verify import Verifier
    from megatron_spice.rollout.pool import RolloutPool
    from megatron_spice.rollout.supervisor import SglangEngine

    config = GameConfig(prompt_style="few_shot", answer_types=["Integer", "String"])
    rollout = RolloutConfig(
        engines_per_node=job["ranks"], threads=job["threads"], max_running_requests=256, seed=job["seed"], context_length=2048,
    )  # fmt: skip
    model = Path(job["model"])
    tokenizer, verifier = TextTokenizer.from_dir(model), Verifier(config.verifier)
    engine = Watched(SglangEngine(rollout, here, "bf16", model, folder / "engine.log", load_format="auto"))
    ended: list[float] = []

    async def play(passage: Passage, iteration: int, slot: int, engine: Any) -> Any:
        uneven = config.model_copy(update=limits(job["seed"], iteration, slot, job["most_tokens"]))
        try:
            return await play_passage(
                passage, iteration=iteration, slot=slot, engine=engine, tokenizer=tokenizer, verifier=verifier, config=uneven,
                temperature=1.0, top_p=1.0, seed=job["seed"],
            )  # fmt: skip
        finally:
            ended.append(time.monotonic())

    pool = RolloutPool(here, store, [engine], play, passages_in_flight=job["in_flight"], helpers=[verifier])
    rounds = []
    try:
        pool.start()
        for number in range(job["rounds"] + 1):
            passages = [Passage(slot, slot, "words", (), text) for slot, text in enumerate(texts(job, number))]
            dist.barrier()
            mark = (time.monotonic(), engine.busy, engine.requests, processor_seconds(engine.pid))
            ended.clear()
            episodes = pool.play(number, new_games(number, passages)).episodes
            mine = _window(mark, engine, ended, [episode.seconds for episode in episodes])
            everyone: list[Any] = [None] * here.world_size
            dist.all_gather_object(everyone, mine)
            rounds.append(everyone)
    finally:
        pool.close()
    return {"title": job["title"], "rounds": (kept := rounds[1:])} | summary(kept)  # the first warms the servers up


def _window(mark: tuple[float, ...], engine: Watched, ended: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """What one engine did from the start until its last passage ended."""
    began, busy, requests, processor = mark
    end = max(ended, default=began)
    return {
        "began": began, "ended": end, "passages": len(ended), "busy": engine.busy - busy,
        "requests": engine.requests - requests, "processor": processor_seconds(engine.pid) - processor,
        "longest_passage": max(seconds), "shortest_passage": min(seconds),
    }  # fmt: skip


def texts(job: dict[str, Any], number: int) -> list[str]:
    """The passages of a round: random words."""
    rng = random.Random(f"{job['seed']} texts {number}")
    return [" ".join(rng.choices(WORDS, k=_between(rng, 20, 300))).capitalize() + "." for _ in range(job["passages"])]


def limits(seed: int, number: int, slot: int, most_tokens: int) -> dict[str, int]:
    """The settings of `game` in which a passage differs from others."""
    rng = random.Random(f"{seed} limits {number} {slot}")
    challenger = _between(rng, min(8, most_tokens), most_tokens)
    return {
        "attempts": _between(rng, 8, 64), "challenger_max_tokens": challenger,
        "reasoner_max_tokens": _between(rng, min(4, most_tokens), max(4, most_tokens // 2)),
    }  # fmt: skip


def _between(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def processor_seconds(pid: int) -> float:
    """Processor time of the busiest process of a server: its scheduler, which computes the model."""
    import psutil

    server = psutil.Process(pid)
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return max(each.user + each.system for each in times)


def summary(rounds: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Idle share of each engine in each round, and over all; the tail; the processor's share.

    An engine that got no passage was idle for want of work.
    """
    engines = [engine for each in rounds for engine in each if engine["passages"]]
    spans = [engine["ended"] - engine["began"] for engine in engines]
    idle = [1 - engine["busy"] / span for engine, span in zip(engines, spans)]
    tails = [
        (max(engine["ended"] for engine in each) - min(engine["ended"] for engine in each))
        / (max(engine["ended"] for engine in each) - min(engine["began"] for engine in each))
        for each in rounds
    ]  # fmt: skip
    return {
        "idle": 1 - sum(engine["busy"] for engine in engines) / sum(spans), "most_idle": max(idle), "all_idle": idle,
        "tail": statistics.median(tails), "all_tails": tails,
        "processor": sum(engine["processor"] for engine in engines) / sum(spans),
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each engine of each round, then the shares that are judged."""
    lines = []
    for result in results:
        rows = [["round", "engine", "passages", "requests", "seconds", "idle s", "idle", "passages took s", "tail s"]]
        for number, each in enumerate(result["rounds"], 1):
            last = max(engine["ended"] for engine in each)
            for place, engine in enumerate(each):
                span = engine["ended"] - engine["began"]
                idle = span - engine["busy"]
                rows.append([
                    str(number), str(place), f"{engine['passages']:.0f}", f"{engine['requests']:.0f}", f"{span:.1f}",
                    f"{idle:.3f}", f"{idle / span:.2%}" if span else "-",
                    f"{engine['shortest_passage']:.1f} to {engine['longest_passage']:.1f}", f"{last - engine['ended']:.1f}",
                ])  # fmt: skip
        lines += [
            columns(rows),
            f"idle while work remains: {result['idle']:.2%} of the engines' time, {result['most_idle']:.2%} at most in a round",
            f"processor time of the schedulers: {result['processor']:.0%} of the engines' time",
            f"from the first engine's end to the last one's: {result['tail']:.0%} of a round (median)",
        ]
    return "\n".join(lines)

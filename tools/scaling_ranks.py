"""The ranks of `tools/benchmark.py scaling`: one process imports what a rank needs and forks them, so that 32 fit a small
machine and start at once. Each then runs `train.py` as torchrun's ranks do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from simulated_engine import Pace, SimulatedEngine, request_seconds, serve

from megatron_spice.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
CHALLENGER_LIMIT, REASONER_LIMIT, GROUP = 64, 16, 8
PHASES = ("sync", "play", "wake", "train", "other")
WORDS = "the river lake export gold cocoa capital area coast island north Accra Volta people trade port of and in is was".split()


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one number of ranks; this process serves none of them but starts them all."""
    count = job["virtual_ranks"]
    with tempfile.TemporaryDirectory(prefix="spice-scaling-") as name:
        folder = Path(name)
        recipe = make_recipe(folder, job)
        pace = Pace(**job["pace"], vocabulary=json.loads((folder / "hf" / "config.json").read_text())["vocab_size"], seed=job["seed"])
        sockets = [_listen() for _ in range(count)]
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        server = _fork(lambda: serve(sockets, pace))
        for each in sockets:
            each.close()
        _import_everything()
        ranks = [_fork(lambda rank=rank: _rank(rank, job, recipe, urls, folder)) for rank in range(count)]
        try:
            _wait(ranks)
        finally:
            for process in (*ranks, server):
                _end(process)
        result.write_text(json.dumps(read_result(folder, job, pace)))


def make_recipe(folder: Path, job: dict[str, Any]) -> Path:
    """A tiny model with random weights and a tokenizer, a corpus of random words, and a recipe for them."""
    model = folder / "hf"
    _write_tokenizer(model)
    _write_model(model, json.loads((model / "tokenizer.json").read_text()))
    import random

    rng = random.Random(job["seed"])
    texts = [" ".join(rng.choices(WORDS, k=40)).capitalize() + f" {number}." for number in range(64 * job["passages"])]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = [str(ROOT / "tools" / "preprocess_corpus.py"), str(folder / "texts.jsonl"), "--tokenizer", str(model)]
    subprocess.run(
        [sys.executable, *corpus, "--output", str(folder / "corpus"), "--max-tokens", "128", "--min-tokens", "8"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    iterations = job["iterations"] + 2
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({
        "run": {"dir": str(folder / "run")}, "corpus": {"path": str(folder / "corpus")},
        "train": {"iterations": iterations, "passages": job["passages"] * job["virtual_ranks"], "seed": job["seed"]},
        "game": {"prompt_style": "few_shot", "answer_types": ["String"], "attempts": GROUP, "group_size": GROUP,
                 "challenger_max_tokens": CHALLENGER_LIMIT, "reasoner_max_tokens": REASONER_LIMIT},
        "rollout": {"passages_in_flight": job["in_flight"], "verify_sync": False},
        "policy": {"model": str(model), "precision": "bf16", "tokens_per_microbatch": 1024},
        "checkpoint": {"every": job["iterations"] + 1}, "cluster": {"ranks_per_node": 1, "device": "cpu", "timeout": 600},
        "telemetry": {"tensorboard": False},
    }))  # fmt: skip
    return recipe


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_spice.game.few_shot_examples import CHALLENGER

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = " ".join(part for example in CHALLENGER["String"] for part in example)
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    tokens.train_from_iterator([text, " ".join(WORDS), "Passage: Question: Answer:"] * 3, trainer)
    folder.mkdir(parents=True)
    tokens.save(str(folder / "tokenizer.json"))


def _write_model(folder: Path, tokenizer: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    hidden, wide, heads, vocabulary = 32, 64, 4, len(tokenizer["model"]["vocab"])
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": True, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }))  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, wide)}
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    save_file({name: rng.normal(0, 0.05, shape).astype("float32") for name, shape in shapes.items()}, folder / "model.safetensors")


def _import_everything() -> None:
    """What every rank needs, once. Nothing here may start a thread: threads do not survive a fork."""
    from megatron_spice.cluster import platform

    platform.prepare("cpu")
    import megatron_spice.checkpoint.checkpointer
    import megatron_spice.policy.policy
    import megatron_spice.train  # noqa: F401


def _rank(rank: int, job: dict[str, Any], recipe: Path, urls: Sequence[str], folder: Path) -> None:
    """One rank, on a virtual node of its own."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(len(urls)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ["MASTER_PORT"], "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from megatron_spice.assemble import assemble
    from megatron_spice.config.loader import load_config
    from megatron_spice.telemetry.timer import PhaseTimer
    from megatron_spice.train import train

    records: list[dict[str, Any]] = []
    waits: list[float] = []

    class Recorder(PhaseTimer):
        """Keeps what each iteration took on this rank."""

        def restart(self) -> None:
            if hasattr(self, "_began"):
                records.append({"seconds": self.metrics(), "train_wait": sum(waits), "processor": time.process_time()})
                waits.clear()
            super().restart()

    def build(*parts: Any) -> Any:
        run = assemble(*parts, make_engine=SimulatedEngine.maker(urls))
        run.policy.schedule = waiting_schedule(run.policy.schedule, job["train_per_token"], waits)
        run.timer = Recorder()
        return run

    train(load_config(recipe, []), build)
    (folder / f"rank{rank}.json").write_text(json.dumps(records))


def waiting_schedule(schedule: Callable[..., Any], seconds_per_token: float, waits: list[float]) -> Callable[..., Any]:
    """Megatron's schedule, which waits for as long as a rank's rows would take and computes the shortest of them."""

    def run(*, data_iterator: list[Iterator[Any]], num_microbatches: int, seq_length: int, **rest: Any) -> Any:
        rows = list(data_iterator[0])
        waits.append(seconds_per_token * sum(row.codes_k3.shape[0] for row in rows))
        time.sleep(waits[-1])
        shortest = min(rows, key=lambda row: row.codes_k3.shape[0])
        length = shortest.codes_k3.shape[0]
        return schedule(data_iterator=[iter([shortest])], num_microbatches=1, seq_length=length, **rest)

    return run


def read_result(folder: Path, job: dict[str, Any], pace: Pace) -> dict[str, Any]:
    """The timed iterations: seconds by phase on the first rank, what they take by their waits alone, processor seconds a rank."""
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(job["virtual_ranks"])]
    games: dict[int, list[dict[str, Any]]] = {}
    for line in (folder / "run" / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        games.setdefault(episode["iteration"], []).append(episode)
    iterations = []
    for number in range(1, job["iterations"] + 1):
        mine = [rank[number] for rank in ranks]
        expected = {
            "play": play_seconds(games[number + 1], pace, job["virtual_ranks"] * job["in_flight"]),
            "train": max(each["train_wait"] for each in mine), "sync": pace.update + 2 * pace.hand_over, "wake": pace.hand_over,
        }  # fmt: skip
        processor = statistics_mean(rank[number]["processor"] - rank[number - 1]["processor"] for rank in ranks)
        seconds = {name.removeprefix("seconds/"): value for name, value in mine[0]["seconds"].items()}
        slowest = {name: max(each["seconds"].get(f"seconds/{name}", 0.0) for each in mine) for name in PHASES}
        iterations.append({"seconds": seconds, "slowest": slowest, "expected": expected, "processor": processor})
    saving = ranks[0][job["iterations"] + 1]["seconds"]["seconds/save"]
    return {"title": job["title"], "saving": saving, "ranks": job["virtual_ranks"], "cores": usable_cores(), "phases": PHASES, "iterations": iterations, "job": job}


def statistics_mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def play_seconds(episodes: Sequence[dict[str, Any]], pace: Pace, players: int) -> float:
    """How long the games of an iteration take if nothing costs time but the servers' waits: whoever is free takes the next."""
    ends = [0.0] * players
    for episode in sorted(episodes, key=lambda each: each["slot"]):
        attempts = episode["attempts"]
        seconds = request_seconds(pace, max(attempt["tokens"] for attempt in attempts))
        answered = [answer["tokens"] for attempt in attempts for answer in attempt["answers"]]
        seconds += request_seconds(pace, max(answered)) if answered else 0.0
        first = min(range(players), key=ends.__getitem__)
        ends[first] += seconds
    return max(ends)


def _listen() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(1024)
    return made


def _fork(work: Callable[[], None]) -> int:
    """The process id of a child that does this and ends, and does not outlive this process."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        from megatron_spice.cluster.children import die_with_parent

        die_with_parent(parent)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(processes: Sequence[int]) -> None:
    """Returns when all have ended well.

    Raises:
        RuntimeError: one has not.
    """
    left = set(processes)
    while left:
        process, status = os.waitpid(-1, 0)
        if status:
            raise RuntimeError(f"process {process} ended with status {os.waitstatus_to_exitcode(status)}; what it said is above")
        left.discard(process)


def _end(process: int) -> None:
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

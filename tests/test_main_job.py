"""The main job, run as a person runs it: two Megatron ranks, a real SGLang engine, a real corpus.

What needs many iterations runs on a tiny random model, which writes no valid task and so learns nothing, or on one whose
weights are set so that it can say one question; that tasks vary, rewards follow from the log and weights change is seen in
one iteration of the quickstart's own model, in float32.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from talking_model import talking_model
from tiny_recipe import tiny_recipe, tool

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "smollm2-135m-instruct"
TEXTS = ROOT / "assets" / "factbook.jsonl"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("job"))


def _start(recipe: Path, run_dir: Path, *overrides: str, apart: bool = False) -> subprocess.Popen:
    """`apart`: in a session of its own, as from a terminal of its own."""
    environment = {**os.environ, "SPICE_VENV": str(Path(sys.prefix))}
    return subprocess.Popen(
        ["bash", ROOT / "slurm" / "spice.sh", recipe, f"run.dir={run_dir}", *overrides], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=apart,
    )  # fmt: skip


def _finish(job: subprocess.Popen, code: int = 0) -> str:
    output = job.communicate(timeout=400)[0]
    assert job.returncode == code, output[-6000:]
    return output


def _passages(run_dir: Path) -> list[tuple[int, int]]:
    lines = (run_dir / "episodes.jsonl").read_text().splitlines()
    return [(episode["iteration"], episode["passage"]["index"]) for episode in map(json.loads, lines)]


def _episodes(run_dir: Path) -> list[dict]:
    return [{**json.loads(line), "seconds": 0} for line in (run_dir / "episodes.jsonl").read_text().splitlines()]


def _metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _wait_gone(processes: list[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=seconds)[1]


def _is_trainer(process: psutil.Process) -> bool:
    try:
        return "megatron_spice" in process.cmdline() and "train" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_a_killed_run_goes_on_with_the_passages_an_uninterrupted_one_sees(recipe, tmp_path):
    through = _finish(_start(recipe, tmp_path / "through", "rollout.deterministic=true"))
    assert [line.split(" |")[0] for line in through.splitlines() if line.startswith("iteration ")] == [
        f"iteration {number}/4" for number in (1, 2, 3, 4)
    ]
    first = _metrics(tmp_path / "through")[0]
    assert first["sync/difference"] < 0.02, "in float32 the engine must compute what the policy computes"
    assert first["seconds/other"] < 0.1 * first["seconds/iteration"]

    job = _start(recipe, tmp_path / "killed", "rollout.deterministic=true", "checkpoint.every=1")
    folder = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(folder.glob("iteration_0000002.*partial")) and not (folder / "iteration_0000003").exists():  # in a save
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0][-6000:]
        time.sleep(0.002)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in family:
        if _is_trainer(process):  # torchrun and the ranks; their engines and verifiers must notice by themselves
            os.kill(process.pid, signal.SIGKILL)
    job.communicate()
    assert not _wait_gone(family), "something outlived the killed job"

    resumed = _finish(_start(recipe, tmp_path / "killed", "rollout.deterministic=true"))
    assert "resumed from" in resumed and "iteration 1/4" not in resumed
    assert _passages(tmp_path / "killed") == _passages(tmp_path / "through")
    assert [line["iteration"] for line in _metrics(tmp_path / "killed")] == [1, 2, 3, 4]
    assert _episodes(tmp_path / "killed") == _episodes(tmp_path / "through"), "with seeds the engine must say the same again"
    assert len({attempt["text"] for episode in _episodes(tmp_path / "through") for attempt in episode["attempts"]}) > 20


def test_games_that_were_put_off_go_on_in_the_next_iteration_and_in_a_resumed_run(recipe, tmp_path):
    settings = ("rollout.oversample=1.7", "checkpoint.every=100", "game.challenger_max_tokens=24", "rollout.passages_in_flight=6")
    _finish(_start(recipe, tmp_path, *settings, "train.iterations=2"))
    [saved] = (tmp_path / "checkpoints").glob("iteration_*")
    carried = json.loads((saved / "run_state.json").read_text())["carried"]
    assert len(carried) == 3, "of the 6 that each iteration begins, 3 end"
    _finish(_start(recipe, tmp_path, *settings, "train.iterations=4"))
    metrics = _metrics(tmp_path)
    assert [line["game/carried_over"] for line in metrics] == [3, 3, 3, 3]
    assert sum(line["game/aborted"] for line in metrics) > 0
    assert metrics[0]["policy/stale_token_share"] == 0 < max(line["policy/stale_token_share"] for line in metrics)
    assert max(line["drift/mean"] for line in metrics if "drift/mean" in line) < 0.02, "stale tokens are no drift"

    episodes = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [episode["iteration"] for episode in episodes] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    for episode in episodes:
        versions = [attempt["weights"] for attempt in episode["attempts"]]
        assert all(episode["begun"] - 1 <= int(each) < episode["iteration"] for one in versions for each in one.split("+"))
    # What is begun is drawn in order, and nothing is begun twice: each iteration draws as many as have ended.
    sampler = PassageSampler(Corpus(recipe.parent / "corpus", TextTokenizer.from_dir(recipe.parent / "hf")), 5)
    drawn = {
        (begun, slot): passage.index
        for begun, size in ((1, 6), (2, 3), (3, 3), (4, 3))
        for slot, passage in enumerate(sampler.next(size))
    }
    ended = {(episode["begun"], episode["slot"]): episode["passage"]["index"] for episode in episodes}
    assert len(ended) == 12 and ended.items() <= drawn.items()
    resumed = {(game["begun"], game["slot"]) for game in carried}
    assert not resumed & {key for key, episode in zip(ended, episodes) if episode["iteration"] <= 2}


def _kill_engine(job: subprocess.Popen, run_dir: Path, after: int, but: psutil.Process | None = None) -> psutil.Process:
    """Kills the job's engine, which is another than `but`, when `after` iterations are logged."""
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < after or not (engines := _engines(job, but)):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0][-6000:]
        time.sleep(0.05)
    engines[0].kill()
    return engines[0]


def _engines(job: subprocess.Popen, but: psutil.Process | None) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process != but and "megatron_spice.rollout.sglang_server" in process.cmdline():
                found.append(process)
    return found


def test_a_run_whose_engines_are_killed_gives_up_in_good_order_and_plays_every_passage_once(recipe, tmp_path):
    """Once, and the engine is replaced; then its replacement too before it has done anything. A converted model, tensor parallel ranks,
    and an engine of as many."""
    tool("convert_checkpoint", "hf-to-megatron", recipe.parent / "hf", tmp_path / "megatron")
    settings = (
        "checkpoint.every=100", "policy.pipeline_parallel_size=1", "policy.tensor_parallel_size=2", "rollout.tensor_parallel_size=2",
        f"policy.model={tmp_path / 'megatron'}", "rollout.max_restarts=1", "train.iterations=6",
    )  # fmt: skip
    run = tmp_path / "run"
    job = _start(recipe, run, *settings)
    first = _kill_engine(job, run, after=1)
    second = _kill_engine(job, run, after=3, but=first)
    _kill_engine(job, run, after=3, but=second)
    output = job.communicate(timeout=400)[0]
    assert job.returncode not in (0, None)
    assert output.count("it is replaced") == 2, output[-6000:]
    given_up = re.search(r"rollout.max_restarts=1(?s:.*)saved up to iteration ([345]) ", output)
    assert given_up, output[-6000:]

    resumed = _finish(_start(recipe, run, *settings))
    assert "resumed from" in resumed and f"iteration_000000{given_up[1]}" in resumed
    metrics = _metrics(run)
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[0]["engines/restarts"] == 0 and metrics[-1]["engines/restarts"] == 1, "what was not saved was not counted"
    sampler = PassageSampler(Corpus(recipe.parent / "corpus", TextTokenizer.from_dir(recipe.parent / "hf")), 5)
    expected = [(number, passage.index) for number in range(1, 7) for passage in sampler.next(3)]
    assert _passages(run) == expected
    assert max(line["sync/difference"] for line in metrics) < 0.02, "a new engine must have the current weights"


def test_a_run_that_is_asked_to_end_is_saved(recipe, tmp_path):
    """Between two checkpoints: what was learned since is not lost. A terminal's Ctrl-C goes to all processes at once."""
    job = _start(recipe, tmp_path, "checkpoint.every=100", "train.iterations=50", apart=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or len(_metrics(tmp_path)) < 2:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0][-6000:]
        time.sleep(0.05)
    family = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    output = job.communicate(timeout=120)[0]
    assert job.returncode not in (0, None) and "interrupted (SIGINT)" in output, output[-6000:]
    done = len(_metrics(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"iteration_{done:07d}"]
    assert not _wait_gone(family), "something outlived the job"


def test_a_run_with_engines_that_run_already(recipe, tmp_path, monkeypatch):
    """Two of them, one a rank, started here as anybody may start them; the run uses them and leaves them running."""
    from megatron_spice.cluster.topology import Topology
    from megatron_spice.config.schema import RolloutConfig
    from megatron_spice.rollout import supervisor

    monkeypatch.setattr(supervisor.secrets, "token_urlsafe", lambda size: "a-key")
    config = RolloutConfig(max_total_tokens=4096, max_running_requests=8, context_length=1024, threads=1)
    servers = [
        supervisor.SglangEngine(config, Topology(rank=rank), "fp32", recipe.parent / "hf", tmp_path / f"server_{rank}.log")
        for rank in range(2)
    ]
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_ready()
        urls = ",".join(server.client.url for server in servers)
        run, settings = tmp_path / "run", (f"rollout.engines=[{urls}]", "train.iterations=2", "train.passages=6")
        refused = _finish(_start(recipe, run, *settings), code=1)
        assert refused.count("it wants another key: give it in the environment variable SPICE_ENGINE_KEY") == 2, refused
        monkeypatch.setenv("SPICE_ENGINE_KEY", "a-key")
        output = _finish(_start(recipe, run, *settings))
        assert "2 engine(s) that ran already" in output and not list(run.glob("logs/engine_*"))
        assert max(line["sync/difference"] for line in _metrics(run)) < 0.02
        assert len(_passages(run)) == 12
        for server in servers:
            assert server.client.weight_version() == "1"
            assert len(server.score([1, 2, 3])) == 2
    finally:
        with ThreadPoolExecutor() as closers:  # in good order, which takes seconds
            list(closers.map(lambda server: server.close(), servers))


def test_a_recipe_that_cannot_run_ends_with_2_before_anything_starts(recipe, tmp_path):
    """tests/test_launch.py has more of them."""
    output = _finish(_start(recipe, tmp_path / "run", "game.group_size=many"), code=2)
    assert "game.group_size" in output and "many" in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not (MODEL.exists() and TEXTS.exists()), reason="needs the quickstart's assets (tests/run.sh fetches them)")
def test_the_real_model_learns_from_what_the_log_says(tmp_path):
    tool("preprocess_corpus", TEXTS, "--tokenizer", MODEL, "--output", tmp_path / "corpus", "--max-tokens", 160, "--min-tokens", 60)
    run = tmp_path / "run"
    _finish(_start(
        ROOT / "examples" / "quickstart.yaml", run, "train.iterations=1", "train.passages=3", "policy.precision=fp32",
        f"policy.model={MODEL}", f"corpus.path={tmp_path / 'corpus'}",
    ))  # fmt: skip
    [metrics] = _metrics(run)
    assert metrics["drift/mean"] < 0.02, "engine and policy must give the sampled tokens the same probability"
    assert metrics["sync/difference"] < 0.02
    assert 0 < metrics["challenger/valid_share"] < 1 and metrics["policy/grad_norm"] > 0

    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == 3
    for episode in episodes:
        group = [attempt for attempt in episode["attempts"] if attempt["in_group"]]
        mean = sum(attempt["reward"] for attempt in group) / len(group)
        for attempt in group:
            p = sum(answer["correct"] for answer in attempt["answers"]) / 8
            reward = math.exp(-((p * (1 - p) - 0.25) ** 2) / 0.02) if attempt["valid"] else -0.1
            assert attempt["reward"] == pytest.approx(reward)
            assert attempt["advantage"] == pytest.approx(reward - mean)

    tool("convert_checkpoint", "megatron-to-hf", run / "checkpoints" / "iteration_0000001", tmp_path / "trained")
    before, after = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert len(changed) > 0.9 * len(before), "the weights did not change"


# Every switch that changes what is computed, away from its default. The cap is below every ratio of policy and engine, so
# it holds for every token and the loss follows from the log; the rate is high enough to move weights of eight bits.
SWITCHES = {
    "game": {"advantage_baseline": "role", "baseline_decay": 0.75, "challenger_max_tokens": 12},
    "policy": {
        "precision": "fp8", "pipeline_parallel_size": 1, "tensor_parallel_size": 2, "sequence_parallel": True,
        "sleep": "all", "kl_coefficient": 0.05, "entropy_bonus": 0.05, "importance_cap": 0.5, "learning_rate": 2e-3,
    },
    "policy.fp8": {"recipe": "blockwise", "format": "e4m3", "first_layers_bf16": 1},
    "policy.role_weights": {"challenger": 0.5, "reasoner": 1.0},
}  # fmt: skip
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
Played = list[tuple[str, float, int]]


def _trained(run_dir: Path, iteration: int) -> list[tuple[str, dict]]:
    """What was trained on, by the log: role and attempt or answer."""
    episodes = [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]
    attempts = [attempt for episode in episodes if episode["iteration"] == iteration for attempt in episode["attempts"]]
    trained = {
        "challenger": [attempt for attempt in attempts if attempt["in_group"]],
        "reasoner": [answer for attempt in attempts if attempt["is_reasoner_task"] for answer in attempt["answers"]],
    }
    return [(role, one) for role, ones in trained.items() for one in ones]


def _moved(baselines: dict[str, float], played: Played) -> dict[str, float]:
    """The baselines after an iteration; a role's first rewards are where its baseline begins."""
    decay = SWITCHES["game"]["baseline_decay"]
    means = {role: fmean(reward for other, reward, _ in played if other == role) for role in ("challenger", "reasoner")}
    return {role: decay * baselines.get(role, mean) + (1 - decay) * mean for role, mean in means.items()}


def _assert_audit(output: str) -> None:
    """One line for all layers alike: what runs in FP8 always did, what does not says why, before the first iteration."""
    before = output.partition("\niteration ")[0]
    rows = [re.split(r" {2,}", line) for line in before.splitlines() if re.match(r"decoder\.|embedding|output_layer", line)]
    assert {row[0]: tuple(row[1:3]) for row in rows} == {
        **{f"decoder.layers.1-3.{linear}": ("fp8", "blockwise e4m3") for linear in LINEARS},
        **{f"decoder.layers.0.{linear}": ("bf16", "policy.fp8.first_layers_bf16=1") for linear in LINEARS},
        "decoder.layers.0-3.self_attention.core_attention": ("bf16", "RowAttention has no FP8 form"),
        "embedding.word_embeddings": ("bf16", "outside the layers"),
        "output_layer": ("bf16", "outside the layers"),
    }
    for name, precision, _, counted in (row for row in rows if row[0].endswith(LINEARS)):
        ran, of = map(int, re.fullmatch(r"(\d+) of (\d+) forwards in FP8", counted).groups())
        assert of >= 3 and ran == (of if precision == "fp8" else 0), f"{name}: {counted}"  # probe, reference, update
    assert "NOT AS SET" not in output


def _assert_loss(metrics: dict, played: Played, baselines: dict[str, float]) -> None:
    """The loss is - 1/(M L) times the sum of u (C A + beta H - kappa K) over tokens.

    H and K are logged for both roles together, so what they add is known but for the weight, 0.5 to 1.
    """
    policy, weights = SWITCHES["policy"], SWITCHES["policy.role_weights"]
    count = metrics["policy/completion_tokens"]
    assert metrics["policy/capped"] == 1.0 and count == sum(tokens for _, _, tokens in played)
    paid = sum(weights[role] * tokens * (reward - baselines[role]) for role, reward, tokens in played)
    total = -metrics["policy/loss"] * len(played) * SWITCHES["game"]["challenger_max_tokens"]
    added = total - policy["importance_cap"] * paid
    bonus = policy["entropy_bonus"] * metrics["policy/entropy"] * count
    penalty = policy["kl_coefficient"] * metrics["policy/kl"] * count
    assert bonus > 0.2
    assert 0.5 * bonus - penalty - 1e-4 < added < bonus - 0.5 * penalty + 1e-4, (added, bonus, penalty)


def test_all_switches_at_once_and_a_resume(recipe, tmp_path):
    """FP8, a baseline for each role, a penalty for leaving the start, an entropy bonus, capped importance, weights of roles,
    all memory given up, tensor and sequence parallel; two iterations, and a third by a run that resumes. What breaks it:

    - a layer computed in another precision than the recipe says, or left out of the audit;
    - optimiser state or weights that stay awake;
    - a reference that is not the first model: its divergence would be above 0 in iteration 1, or 0 in iteration 3;
    - baselines that begin anew, at zero or at the third iteration's mean: tasks are then paid by a rule whose means cannot
      be those of the old one;
    - a loss without the cap, the roles' weights, the baselines or the entropy, or prompts computed once for each completion.
    """
    run = tmp_path / "run"
    overrides = [f"{room}.{key}={json.dumps(value)}" for room, keys in SWITCHES.items() for key, value in keys.items()]
    overrides.append(f"policy.model={talking_model(tmp_path / 'hf')}")
    started = _finish(_start(recipe, run, *overrides, "train.iterations=2"))
    resumed = _finish(_start(recipe, run, *overrides, "train.iterations=3", "game.challenger_reward=absolute_zero"))
    assert "resumed from" in resumed and "iteration 2/3" not in resumed
    assert 'train.iterations: was 2, is 3' in resumed and 'is "absolute_zero"' in resumed and "settings that are not those" not in started
    for output in (started, resumed):
        [line] = [line for line in output.splitlines() if "engine(s), ready after" in line]
        assert "TP=2+SP PP=1 DP=1; fp8; Adam by torch," in line
        assert "; sleep: gradients, optimizer state and weights (copies in host memory);" in line
        assert output.count("# Memory in GiB") == 1, "the first rank prints the budget"
        _assert_audit(output)

    metrics = _metrics(run)
    assert [line["iteration"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["memory/slept_weights_gib"] >= line["sync/gib"] / 2 > 0, "each rank gives up its half of the weights"
        # 16 bits a weight there; here 32 each for its gradient, its master and the master's two moments
        assert line["memory/slept_gib"] > 7 * line["memory/slept_weights_gib"]
        assert line["memory/wake_seconds"] > 0
        assert {line[f"ranks/memory/slept_weights_gib_{end}_rank"] for end in ("min", "max")} <= {0, 1}
        assert line["ranks/memory/most_held_gib_max"] >= line["ranks/memory/most_held_gib_min"] > 0.1
        assert min(line[f"memory/free_for_{who}_gib"] for who in ("weights", "kv_cache", "policy")) > 0
        assert line["policy/prefix_saving"] > 1.5, "groups of two share their prompts"
    first, second, third = (line["policy/kl"] for line in metrics)
    assert first == 0.0 and second > 1e-9 and third > 1e-9, "how far a step goes depends on what was sampled"

    baselines: dict[str, float] = {}
    for number, line in enumerate(metrics, start=1):
        trained = _trained(run, number)
        played = [(role, one["reward"], one["tokens"]) for role, one in trained]
        after = _moved(baselines, played)
        _assert_loss(line, played, baselines or after)
        assert line["reasoner/baseline"] == pytest.approx((baselines or after)["reasoner"])
        for role, one in trained:
            assert one["advantage"] == pytest.approx(one["reward"] - line[f"{role}/baseline"], abs=1e-9)
        baselines = after
        saved = run / "checkpoints" / f"iteration_{number:07d}"
        assert saved.exists() == (number > 1)
        if number > 1:
            assert json.loads((saved / "run_state.json").read_text())["baselines"] == pytest.approx(baselines)

    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["train"]["iterations"] == 3
    for room, keys in SWITCHES.items():
        found = functools.reduce(dict.get, room.split("."), written)
        assert {key: found[key] for key in keys} == keys

"""The real server through the real client, against transformers on the same weights in float32."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout.client import EngineClient
from megatron_spice.rollout.engine import EngineError, EngineRefused
from megatron_spice.rollout.supervisor import SglangEngine
from tests.rollout.processes import assert_forked

PROMPT = [40, 41, 50, 60, 70, 45]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def generate(engine: SglangEngine, *requests: tuple[list[int], int, Sampling]) -> list[list[Completion]]:
    async def all_of_them() -> list[list[Completion]]:
        try:
            return await asyncio.gather(*(engine.generate(*request) for request in requests))
        finally:
            await engine.close_requests()

    return asyncio.run(all_of_them())


def logprobs(model: torch.nn.Module, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[length - 1] of ids[1:], by transformers."""
    with torch.no_grad():
        table = (model(torch.tensor([ids])).logits[0, :-1] / temperature).log_softmax(-1)
    return table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
    return ids[len(prompt) :]


def update(engine: SglangEngine, tensors: list[tuple[str, torch.Tensor]], version: str) -> None:
    """All tensors in three buckets."""
    engine.begin_update()
    for part in range(3):
        engine.update_bucket(tensors[part::3])
    engine.end_update(version)


def named(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def test_greedy_tokens_are_those_of_transformers(engine: SglangEngine, model: torch.nn.Module) -> None:
    prompts = [PROMPT, PROMPT[:2], list(range(30, 150))]  # alone and in one batch, short and long
    for batch in ([prompts[0]], prompts):
        for prompt, [found] in zip(batch, generate(engine, *((prompt, 1, GREEDY) for prompt in batch))):
            assert list(found.completion_ids) == greedy(model, prompt, 12) and found.prompt_ids == tuple(prompt)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_of_the_sampled_ids_at_the_sampling_temperature(
    engine: SglangEngine, model: torch.nn.Module, temperature: float
) -> None:
    requests = [(PROMPT, 8, Sampling(temperature, 20)), (list(range(60, 160)), 8, Sampling(temperature, 15))]
    groups = generate(engine, *requests)
    for (prompt, _, _), group in zip(requests, groups):
        assert len({completion.completion_ids for completion in group}) > 1
        for completion in group:
            ids = [*prompt, *completion.completion_ids]
            expected = logprobs(model, ids, temperature)[len(prompt) - 1 :]
            assert len(completion.logprobs) == len(completion.completion_ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


def test_a_completion_is_cut_at_the_limit_or_ends_at_an_end_of_text(engine: SglangEngine, model: torch.nn.Module) -> None:
    [[cut]] = generate(engine, (PROMPT, 1, Sampling(1.0, 3)))
    assert cut.finish == "length" and len(cut.completion_ids) == 3
    [ended] = [group for group in generate(engine, (PROMPT, 32, Sampling(1.0, 400)))]
    stopped = [completion for completion in ended if completion.finish == "stop"]
    assert stopped and all(completion.completion_ids[-1] == 2 for completion in stopped)
    assert all("<|im_end|>" not in completion.text for completion in stopped)


def test_a_stop_string_ends_the_text_but_its_tokens_are_kept(engine: SglangEngine, tokenizer) -> None:
    [[free]] = generate(engine, (PROMPT, 1, GREEDY))
    place = next(i for i in range(3, 9) if tokenizer.decode(list(free.completion_ids[i : i + 1])).isascii())
    stop = tokenizer.decode(list(free.completion_ids[place : place + 1]))
    [[found]] = generate(engine, (PROMPT, 1, Sampling(0.0, 12, stop=("never occurs", stop))))
    assert found.finish == "stop" and stop not in found.text
    assert found.completion_ids == free.completion_ids[: len(found.completion_ids)]
    assert stop in tokenizer.decode(list(found.completion_ids)) and len(found.logprobs) == len(found.completion_ids)
    assert tokenizer.decode(list(found.completion_ids)).startswith(found.text)


def test_score_is_the_prompts_own_logprobs(engine: SglangEngine, model: torch.nn.Module) -> None:
    ids = list(range(40, 140))
    for _ in range(2):  # the second time from the prefix cache
        torch.testing.assert_close(torch.tensor(engine.score(ids)), logprobs(model, ids), atol=1e-3, rtol=0)
    last = [*PROMPT, model.config.vocab_size - 1, 40]  # which the server reports as 0
    torch.testing.assert_close(torch.tensor(engine.score(last)), logprobs(model, last), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="two token ids"):
        engine.score([1])


def test_after_an_update_the_engine_computes_with_the_new_weights(engine: SglangEngine, model: torch.nn.Module) -> None:
    import copy

    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    try:
        update(engine, named(changed), "7")
        assert engine.weight_version() == "7"
        [[found]] = generate(engine, (PROMPT, 1, GREEDY))
        assert list(found.completion_ids) == greedy(changed, PROMPT, 12) != greedy(model, PROMPT, 12)
        assert found.weight_version == "7"

        name, tensor = max(named(changed), key=lambda pair: pair[1].numel())
        corrupted = tensor.clone()
        corrupted.view(torch.uint8).view(-1)[: corrupted.nbytes // 2].bitwise_xor_(0x40)
        expected = torch.tensor(engine.score(PROMPT))
        update(engine, [*named(changed)[:5], (name, corrupted)], "8")
        assert (torch.tensor(engine.score(PROMPT)) - expected).abs().mean() > 0.15
    finally:
        update(engine, named(model), "default")
    torch.testing.assert_close(torch.tensor(engine.score(PROMPT)), logprobs(model, PROMPT), atol=1e-3, rtol=0)


def test_an_update_outside_a_session_is_an_error(engine: SglangEngine, model: torch.nn.Module) -> None:
    with pytest.raises(EngineError, match="begin_weight_update"):
        engine.update_bucket(named(model)[:1])
    with pytest.raises(EngineError, match="no weight-update session"):
        engine.end_update("9")
    assert engine.weight_version() == "default"


def test_generating_while_weights_are_updated_is_an_error(engine: SglangEngine, model: torch.nn.Module) -> None:
    engine.begin_update()
    try:
        with pytest.raises(EngineError, match="being updated"):
            generate(engine, (PROMPT, 1, GREEDY))
        with pytest.raises(EngineError, match="end_update first"):
            engine.sleep()
        with pytest.raises(EngineError, match="already open"):
            engine.begin_update()
    finally:
        engine.update_bucket(named(model)[:1])
        engine.end_update("default")


def test_a_sleeping_engine_refuses_and_wakes_in_two_steps(engine: SglangEngine, model: torch.nn.Module) -> None:
    engine.sleep()
    engine.sleep()
    with pytest.raises(EngineError, match="kv_cache and weights sleep"):
        generate(engine, (PROMPT, 1, GREEDY))
    with pytest.raises(EngineError, match="weights are asleep"):
        engine.begin_update()
    engine.wake(["weights"])
    update(engine, named(model), "default")
    with pytest.raises(EngineError, match="kv_cache sleep"):
        engine.score(PROMPT)
    engine.wake()
    engine.wake()
    [[found]] = generate(engine, (PROMPT, 1, GREEDY))
    assert list(found.completion_ids) == greedy(model, PROMPT, 12)


def test_a_pause_ends_what_runs_and_the_engine_goes_on_afterwards(engine: SglangEngine) -> None:
    async def interrupted() -> list[Completion]:
        running = asyncio.ensure_future(engine.generate(list(range(30, 40)), 2, Sampling(1.0, 480)))
        while not running.done():  # an abort that comes before the request changes nothing, so it is repeated
            await asyncio.sleep(0.02)
            await asyncio.to_thread(engine.client.abort_all)
        try:
            return await running
        finally:
            await engine.close_requests()

    assert {completion.finish for completion in asyncio.run(interrupted())} <= {"abort", "stop"}
    engine.client.pause()
    assert not engine.client.is_ready()
    engine.client.resume()
    assert len(generate(engine, (PROMPT, 1, GREEDY))[0][0].completion_ids) > 0


def test_what_the_server_refuses_is_an_error_with_its_words(engine: SglangEngine) -> None:
    with pytest.raises(EngineRefused, match="(?s)/generate was answered with 400.*longer than") as error:
        generate(engine, (list(range(4)) * 200, 1, GREEDY))
    assert error.value.status == 400


def test_a_wrong_key_is_refused(engine: SglangEngine) -> None:
    stranger = EngineClient(engine.client.url, "wrong")
    for call in (stranger.weight_version, stranger.begin_update, stranger.abort_all):
        with pytest.raises(EngineError, match="401"):
            call()


def test_the_server_listens_on_loopback_only_and_its_key_is_not_in_the_process_list(engine: SglangEngine) -> None:
    port = int(engine.client.url.rpartition(":")[2])
    addresses = {
        fields[1].split(":")[0]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in (line.split() for line in Path(table).read_text().splitlines()[1:])
        if int(fields[1].split(":")[1], 16) == port and fields[3] == "0A"  # LISTEN
    }
    assert addresses == {"0100007F"}
    arguments = subprocess.run(["ps", "-ww", "-o", "args", "-g", str(engine.pid)], capture_output=True, text=True).stdout
    assert "sglang_server" in arguments and "api_key" not in arguments
    assert stat.S_IMODE(os.stat(engine.log_path).st_mode) == 0o600


def test_proxy_variables_are_ignored(engine: SglangEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert engine.weight_version() == "default" and generate(engine, (PROMPT, 1, GREEDY))


def test_its_processes_share_what_the_server_has_imported(engine: SglangEngine) -> None:
    assert_forked(engine)

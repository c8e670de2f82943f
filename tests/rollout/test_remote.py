"""Engines that run already: two real servers in one broadcast group with this process, one of which is ended, stopped, started.

The servers are those of the other tests, which are processes of their own; what talks to them here has only their address
and key, and shares no memory with them.
"""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.game.records import Sampling
from megatron_spice.rollout import broadcast, supervisor
from megatron_spice.rollout.broadcast import Sender, address_towards, pack
from megatron_spice.rollout.crew import Crew
from megatron_spice.rollout.engine import EngineError
from megatron_spice.rollout.remote import Expected, RemoteEngine
from megatron_spice.rollout.supervisor import SglangEngine
from tests.rollout.processes import processes

PROMPT = [40, 41, 50, 60, 70, 45]


def key_of(server: SglangEngine) -> str:
    return server.client._http.headers["Authorization"].removeprefix("Bearer ")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def servers(
    engine: SglangEngine, new_engine: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[SglangEngine]]:
    """The one that all tests share, which is left as it was, and one of this module's own."""
    other = new_engine(tmp_path_factory.mktemp("logs") / "other.log")
    other.launch()
    try:
        other.wait_ready()
        yield [engine, other]
    finally:
        other.kill()  # some of its groups ended badly, on purpose


@pytest.fixture
def crew(servers: list[SglangEngine], model: torch.nn.Module) -> Iterator[Crew]:
    """Two remote engines of one rank, for a model that is the servers' own; both are ready."""
    made = Crew(remotes(servers, model, Sender("cpu")), max_restarts=1)
    for remote in made.engines:
        remote.introduce()
        remote.wait_ready()
    try:
        yield made
    finally:
        for remote in made.engines:
            remote.close()


def remotes(servers: list[SglangEngine], model: torch.nn.Module, sender: Sender, **settings: object) -> list[RemoteEngine]:
    config = RolloutConfig(**{"request_timeout": 60.0, "start_timeout": 60.0, "hang_timeout": 3.0, **settings})
    expected = Expected("llama", model.config.vocab_size, 512)
    return [RemoteEngine(server.client.url, config, key_of(server), expected, sender) for server in servers]


def changed(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return other


def parts(model: torch.nn.Module) -> list[list[tuple[str, torch.Tensor]]]:
    """All tensors in three buckets."""
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    return [tensors[part::3] for part in range(3)]


def update(crew: Crew, model: torch.nn.Module, version: str, harm: Callable[[], None] = lambda: None) -> None:
    """As a sync does it; `harm` is done after the first bucket."""
    crew.each(lambda engine: engine.begin_update())
    for number, bucket in enumerate(parts(model)):
        crew.each(lambda engine, bucket=bucket: engine.update_bucket(bucket))
        if number == 0:
            harm()
    crew.each(lambda engine: engine.end_update(version))


def assert_same(engine: RemoteEngine, model: torch.nn.Module) -> None:
    ids = list(range(40, 100))
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(engine.score(ids)), expected, atol=1e-3, rtol=0)


def test_both_engines_compute_with_what_was_broadcast(crew: Crew, model: torch.nn.Module, servers: list[SglangEngine]) -> None:
    try:
        for version, new in (("1", changed(model, 1)), ("2", changed(model, 2))):  # the second in the same group
            update(crew, new, version)
            assert crew.num_lost == 0, crew.last_words()
            for remote in crew.engines:
                assert remote.weight_version() == version
                assert_same(remote, new)

        async def generate() -> str:
            try:
                [completion] = await crew.engines[0].generate(PROMPT, 1, Sampling(1.0, 4))
                return completion.weight_version
            finally:
                await crew.engines[0].close_requests()

        assert asyncio.run(generate()) == "2"
        for remote in crew.engines:
            remote.sleep()
            remote.wake()
    finally:
        update(crew, model, "default")


def on_the_old_port(monkeypatch: pytest.MonkeyPatch, server: SglangEngine) -> None:
    """The next launch of this server listens where it does now."""
    number = int(server.client.url.rpartition(":")[2])

    class Same(supervisor.ReservedPort):
        numbers = iter([number])

        def __init__(self) -> None:
            super().__init__()
            self.number = next(self.numbers, self.number)

    monkeypatch.setattr(supervisor, "ReservedPort", Same)


def test_one_that_dies_in_a_sync_is_noticed_and_taken_back(
    crew: Crew, model: torch.nn.Module, servers: list[SglangEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = crew.engines
    key, leader = key_of(servers[1]), servers[1].pid
    assert leader is not None
    try:
        new = changed(model, 3)
        began = time.monotonic()
        update(crew, new, "3", lambda: os.kill(leader, signal.SIGKILL))
        assert time.monotonic() - began < 15
        assert crew.working == [first] and second.url in crew.last_words()[0]
        assert_same(first, new)  # the other one misses nothing

        on_the_old_port(monkeypatch, servers[1])
        monkeypatch.setattr(supervisor.secrets, "token_urlsafe", lambda size: key)
        servers[1].launch()
        crew.revive()  # waits for it
        assert crew.restarts == 1 and crew.num_lost == 0
        update(crew, new, "4")
        assert_same(second, new)
    finally:
        update(crew, model, "default")


def test_one_that_hangs_in_a_sync_does_not_hold_up_the_sender(
    crew: Crew, model: torch.nn.Module, servers: list[SglangEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "PATIENCE", 1.0)
    for remote in crew.engines:
        remote._sender._seconds = 3.0
    leader = servers[1].pid
    assert leader is not None

    def stop() -> None:
        for process in processes(leader):
            os.kill(process, signal.SIGSTOP)

    new = changed(model, 5)
    try:
        began = time.monotonic()
        update(crew, new, "5", stop)
        assert time.monotonic() - began < 15
        assert crew.working == crew.engines[:1] and "did not answer within 4 s" in crew.last_words()[0]
        assert_same(crew.engines[0], new)
    finally:
        for process in processes(leader):
            os.kill(process, signal.SIGCONT)
        update(crew, model, "default")


def test_one_that_hangs_while_it_plays_is_noticed(model: torch.nn.Module, servers: list[SglangEngine]) -> None:
    [remote] = remotes(servers[1:], model, Sender("cpu"))
    remote.wait_ready()
    leader = servers[1].pid
    assert leader is not None

    async def play() -> None:
        work = asyncio.ensure_future(remote.generate(PROMPT, 8, Sampling(1.0, 400)))
        await asyncio.sleep(0.2)
        for process in processes(leader):
            os.kill(process, signal.SIGSTOP)
        try:
            while True:
                await asyncio.sleep(0.2)
                remote.check()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await remote.close_requests()

    began = time.monotonic()
    try:
        with pytest.raises(EngineError, match="(?s)hangs or is gone.*rollout.hang_timeout"):
            asyncio.run(play())
        assert time.monotonic() - began < 10
    finally:
        for process in processes(leader):
            os.kill(process, signal.SIGCONT)
    remote.kill()
    remote.wait_ready()
    remote.check()


def test_what_is_not_the_right_server_is_refused_at_the_start(model: torch.nn.Module, servers: list[SglangEngine]) -> None:
    config, right = RolloutConfig(start_timeout=1.0), Expected("llama", model.config.vocab_size, 512)
    url, key = servers[0].client.url, key_of(servers[0])
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        cases = [
            (nowhere, key, right, "GET /server_info failed"),
            (url, "wrong", right, "(?s)another key.*SPICE_ENGINE_KEY"),
            (url, key, Expected("qwen3", 500, 512), "model_type is llama, policy.model's is qwen3"),
            (url, key, Expected("llama", right.vocab_size + 1, 512), "vocabulary is not policy.model's"),
            (url, key, Expected("llama", right.vocab_size - 1, 512), "vocabulary is not policy.model's"),
            (url, key, Expected("llama", right.vocab_size, 513), "context of 512 tokens.*rollout.context_length=512"),
        ]
        for address, secret, expected, words in cases:
            with pytest.raises(ConfigError, match=words):
                RemoteEngine(address, config, secret, expected, Sender("cpu")).introduce()
        lost = RemoteEngine(nowhere, config, key, right, Sender("cpu"))
        with pytest.raises(EngineError, match="rollout.start_timeout"):
            lost.wait_ready()


def test_an_update_that_was_left_open_does_not_stop_the_next_run(
    crew: Crew, model: torch.nn.Module, servers: list[SglangEngine]
) -> None:
    crew.engines[1].begin_update()
    [later] = remotes(servers[1:], model, Sender("cpu"))
    later.introduce()
    alone = Crew([later])
    update(alone, model, "default")
    assert alone.num_lost == 0, alone.last_words()
    later.close()


def test_tensors_are_laid_out_without_gaps_and_the_widest_first() -> None:
    flat = torch.arange(24, dtype=torch.float32)
    beside = [("a", flat[:8].view(2, 4)), ("b", flat[8:24])]
    assert pack(beside).flat.data_ptr() == flat.data_ptr(), "no copy of what lies in order"
    wide = [("a", flat[:8]), ("b", flat[9:11])]
    apart = [("x", torch.ones(3, dtype=torch.uint8)), *wide, ("h", torch.ones(5, dtype=torch.bfloat16))]
    packed = pack(apart)
    assert packed.contents == {
        "names": ["a", "b", "h", "x"], "dtypes": ["float32", "float32", "bfloat16", "uint8"], "shapes": [[8], [2], [5], [3]],
    }  # fmt: skip
    assert packed.flat.numel() == 32 + 8 + 10 + 3
    assert torch.equal(packed.flat[32:40].view(torch.float32), flat[9:11])


def test_the_address_given_to_servers_is_the_one_they_can_reach() -> None:
    assert address_towards(["http://127.0.0.1:30000", "http://localhost:1"]) == "127.0.0.1"
    with pytest.raises(EngineError, match="no way to it"):
        address_towards(["http://no-such-host.invalid:1"])

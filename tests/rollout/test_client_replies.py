"""Answers that no working server gives are errors of the engine, and say what came."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from megatron_spice.game.records import Sampling
from megatron_spice.rollout.client import EngineClient
from megatron_spice.rollout.engine import EngineError, EngineRefused

GOOD = {
    "text": "ab",
    "meta_info": {
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]], "finish_reason": {"type": "length"}, "weight_version": "3",
    },
}  # fmt: skip


def broken(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "meta_info": {**GOOD["meta_info"], **changes}}


class Server(HTTPServer):
    reply: bytes = b""
    status: int = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.reply)))
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server: Server, reply: Any, status: int = 200) -> Any:
    server.reply, server.status = reply if isinstance(reply, bytes) else json.dumps(reply).encode(), status

    async def once() -> Any:
        client = EngineClient(f"http://127.0.0.1:{server.server_port}", "key", request_timeout=10)
        try:
            return await client.generate([1, 2], 1, Sampling(1.0, 2))
        finally:
            assert client.num_running == 0
            await client.close_requests()

    return asyncio.run(once())


def test_a_good_answer_is_read(server: Server) -> None:
    [completion] = ask(server, GOOD)
    assert (completion.completion_ids, completion.logprobs, completion.weight_version) == ((7, 8), (-0.5, -1.5), "3")


@pytest.mark.parametrize(
    "reply, words",
    [
        (b"", "no completion"),
        (b"<html>a proxy</html>", "no completion"),
        (b"\xff\xfe\x00", "no completion"),
        (b'{"text": "ab", "meta_', "no completion"),
        ({}, "KeyError"),
        ([GOOD, GOOD], "1 samples were asked for, 2 came"),
        ([], "1 samples were asked for, 0 came"),
        (broken(output_token_logprobs=[[None, 7, None]]), "TypeError"),
        (broken(output_token_logprobs=[[-0.5]]), "IndexError"),
        (broken(output_token_logprobs=[[float("nan"), 7, None]]), "log-probabilities of nan"),
        (broken(output_token_logprobs=[[float("-inf"), 7, None]]), "log-probabilities of -inf"),
        (broken(output_token_logprobs=[[0.7, 7, None]]), "log-probabilities of 0.7"),
        (broken(output_token_logprobs=[[-0.5, 7, None]] * 3), "3 tokens where 2 were allowed"),
        (broken(finish_reason=None), "TypeError"),
        (broken(finish_reason={}), "KeyError"),
    ],
)  # fmt: skip
def test_a_malformed_answer_is_an_error_that_shows_it(server: Server, reply: Any, words: str) -> None:
    with pytest.raises(EngineError, match=f"(?s){words}"):
        ask(server, reply)


def test_a_refusal_and_an_unreadable_length_are_errors_too(server: Server) -> None:
    with pytest.raises(EngineRefused, match="answered with 500: out of memory") as error:
        ask(server, b"out of memory", status=500)
    assert (error.value.status, error.value.said) == (500, "out of memory")


def test_an_engine_that_has_ended_is_not_waited_for() -> None:
    """Its server may keep the connection open; and one that lives is waited for as long as was said."""

    def ended() -> None:
        raise EngineError("its scheduler has ended")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match="its scheduler has ended"):
            EngineClient(url, "", control_timeout=30.0, check=ended).end_update("1")
        with pytest.raises(EngineError, match="POST /end_weight_update did not answer within 0.2 s"):
            EngineClient(url, "", control_timeout=0.2).end_update("1")
